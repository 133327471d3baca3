"""The result table of a run, and the sentences under it."""

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_pipe.report.facts import Facts, read_facts
from qlora_pipe.units import format_bytes

_WIDE = 200


def show_results(run: Path) -> str:
    """The run's result table, the verdict on its adapter and its stages, as text for a terminal.

    Colour codes are in it only where standard output is a terminal. Raises ArtifactError.
    """
    facts = read_facts(run)
    parts = [render(*chain_table(facts))] if facts.metrics else ["nothing is evaluated yet"]
    verdict = " ".join(sentence for sentence in (recovery_verdict(facts), gap_verdict(facts)) if sentence)
    parts.append(plain(verdict) or "no adapter is recovered yet")
    parts.append(render(*stage_table(facts)))
    return "\n\n".join(parts)


def render(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A table as text; the first `text_columns` columns are flush left, figures flush right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    stream = io.StringIO()
    width = shutil.get_terminal_size().columns if terminal else _WIDE
    console = Console(file=stream, force_terminal=terminal, width=width, no_color=None if terminal else True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for number, name in enumerate(head):
        table.add_column(Text(plain(name)), justify="left" if number < text_columns else "right")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console.print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def chain_table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a model a row, a perplexity column per data set."""
    head = ["model", *(f"perplexity {name}" for name in facts.datasets), "bits per weight", "size on disk"]
    rows = [
        [
            row.name,
            *(figure(row.perplexity.get(name)) for name in facts.datasets),
            f"{row.bits:.3f}",
            format_bytes(row.bytes),
        ]
        for row in facts.models()
    ]
    return head, rows


def stage_table(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a stage a row; measured memory beside the planned peak."""
    head = ["stage", "seconds", "measured peak", "planned peak", "measured / planned", "written"]
    rows = []
    for row in facts.stages():
        if row.state != "not run":
            share = row.measured / row.planned if row.measured and row.planned else None
            sizes = (_size(row.measured), _size(row.planned), "-" if share is None else f"{share:.2f}")
            name = row.name if row.state == "done" else f"{row.name} ({row.state})"
            rows.append([name, _seconds(row.seconds), *sizes, _size(row.written)])
    return head, rows


def recovery_verdict(facts: Facts) -> str:
    """Whether the recovered adapter helps the full model, in one sentence; empty if it was not measured."""
    found = facts.recovery
    if found is None:
        return ""
    model = f"the {found['base']} full model"
    if found["scale"] == 0:
        return (
            f"The recovered adapter does not help {model} on held-out rows: "
            "no scale that was tried beats 0, so it is exported with scale 0 and changes nothing."
        )
    losses, tau = found["losses"], found["tau"]
    largest = found["scale"] == max(map(float, found["loss_by_scale"]))
    edge = " No larger scale was tried; one may be better (recover.scales)." if largest else ""
    if found.get("correction", "none") != "none":
        edge += " Its B is corrected for the difference between the weights it was trained on and these."
    told = "not defined, for the small model gained nothing" if tau is None else f"{tau:.2f}"
    return (
        f"The recovered adapter helps {model} at scale {found['scale']:g}: held-out loss from {losses['full']:.4f} "
        f"to {losses['full_adapted']:.4f} nats per token, transfer efficiency (tau) {told}.{edge}"
    )


def gap_verdict(facts: Facts) -> str:
    """What is lost when the L4Q adapter is used without the grid it was trained on; empty if not measured."""
    found: dict[str, Any] | None = (facts.recovery or {}).get("unquantise_gap")
    if not found:
        return ""
    share = "which gained nothing" if found["share"] is None else f"{100 * found['share']:.0f} % of what it gained"
    return f"Un-quantise gap of the compact adapter: {found['gap']:+.4f} nats per token, {share}."


def figure(value: float | None) -> str:
    """A perplexity with as many digits as mean something."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def plain(text: str) -> str:
    """`text` without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _size(count: float | None) -> str:
    return "-" if count is None else format_bytes(count)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

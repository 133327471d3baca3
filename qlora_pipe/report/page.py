"""The report of a run: one HTML page that needs nothing else, and the same facts as Markdown."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from qlora_pipe.report import charts
from qlora_pipe.report.facts import MODELS, PRODUCTS, Facts, read_facts, selection_rows
from qlora_pipe.report.table import chain_table, figure, gap_verdict, recovery_verdict, stage_table
from qlora_pipe.units import format_bytes


def write_report(run: Path) -> Path:
    """Write <run>/report.html and <run>/report.md; returns the path of the page. Raises ArtifactError."""
    facts = read_facts(run)
    _replace(run / "report.md", markdown(facts))
    return _replace(run / "report.html", page(facts))


def page(facts: Facts) -> str:
    """The HTML page. Everything that comes from a file is escaped; no script, no other file."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    template = resources.files("qlora_pipe.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"bytes": format_bytes, "figure": figure, "ratio": _ratio}
    drawn = {name: Markup(svg) for name, svg in _charts(facts).items()}
    return environment.from_string(template).render(
        facts=facts,
        tiles=tiles(facts),
        charts=drawn,
        models=facts.models(),
        about=MODELS,
        products=PRODUCTS,
        stages=facts.stages(),
        stage_table=stage_table(facts),
        kept=kept_sentence(facts),
        recovery=recovery_verdict(facts),
        gap=gap_verdict(facts),
    )


def markdown(facts: Facts) -> str:
    """The report as Markdown."""
    parts = [f"# {_inline(facts.title)}", _table(["", "", ""], tiles(facts))]
    if facts.metrics:
        parts += ["## Models", _table(*chain_table(facts))]
    if facts.recovery:
        losses = [[scale, f"{loss:.4f}"] for scale, loss in facts.recovery["loss_by_scale"].items()]
        verdict = " ".join(filter(None, (recovery_verdict(facts), gap_verdict(facts))))
        parts += ["## Recovered adapter", _inline(verdict), _table(["scale", "held-out loss"], losses)]
    if facts.allocation:
        rows = [[name, str(count), format_bytes(size)] for name, count, size in facts.configurations()]
        parts += ["## Configurations", _table(["configuration", "matrices", "bytes"], rows)]
    if facts.kept:
        parts += ["## Structure", _inline(kept_sentence(facts))]
    parts += ["## Stages", _table(*stage_table(facts))]
    hashes = [[name, manifest.identity] for name, manifest in facts.manifests.items()]
    parts += ["## Identities", _table(["stage", "identity"], hashes)]
    return "\n\n".join(parts) + "\n"


def tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """(what, figure, explanation) of what was decided, the most important first."""
    source, allocation = facts.source, facts.allocation
    decompose = facts.settings.get("decompose")
    budget = str(decompose.get("budget", "-")) if isinstance(decompose, dict) else "-"
    budget = budget.replace("bits", " bits")
    about = f"{source['model_type']}, {source['layers']} layers, hidden {source['hidden']}" if source else ""
    found = [("model", facts.title, about)]
    if allocation is None:
        return [*found, ("budget", budget, "not allocated yet"), *_adapter_tile(facts)]
    used = allocation["bytes"] / allocation["budget_bytes"]
    proof = "proved optimal" if allocation["optimal"] else f"within {100 * allocation['gap']:.3g} %"
    loss = f"{allocation['loss']:.6g} (estimated to +-{allocation['loss_error']:.2g})"
    return [
        *found,
        ("budget", budget, f"{format_bytes(allocation['budget_bytes'])} for the linear maps"),
        ("achieved", f"{allocation['bits_per_weight']:.3f} bits", f"per weight; {100 * used:.2f} % of the budget used"),
        ("certificate", proof, f"loss {loss}, no choice can go below {allocation['bound']:.6g}"),
        *_adapter_tile(facts),
    ]


def kept_sentence(facts: Facts) -> str:
    """What pruning keeps, how much goes and how that was decided, in a few sentences; empty if it has not run."""
    if not facts.kept:
        return ""
    first = facts.kept[0]
    about = dict(selection_rows(facts.selection)) if facts.selection else {}
    figures = "".join(f" {name[0].upper()}{name[1:]}: {text}." for name, text in about.items())
    if facts.selection and "sparsity" in facts.selection:
        return f"Every layer keeps its shape, and single entries are zero.{figures}"
    if len(set(facts.kept)) == 1:
        return (
            f"Every layer keeps {first.kv_heads} of {first.all_kv_heads} KV groups and "
            f"{first.ffn} of {first.all_ffn} FFN channels.{figures}"
        )
    kv, ffn = [row.kv_heads for row in facts.kept], [row.ffn for row in facts.kept]
    return (
        f"Layers differ: {min(kv)} to {max(kv)} of {first.all_kv_heads} KV groups and "
        f"{min(ffn)} to {max(ffn)} of {first.all_ffn} FFN channels are kept.{figures}"
    )


def _adapter_tile(facts: Facts) -> list[tuple[str, str, str]]:
    found = facts.recovery
    if found is None:
        return []
    if found["scale"] == 0:
        return [("recovered adapter", "does not help", "exported with scale 0")]
    tau = "" if found["tau"] is None else f"transfer efficiency {found['tau']:.2f}"
    return [("recovered adapter", f"scale {found['scale']:g}", tau)]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 10 else figure(value)


def _charts(facts: Facts) -> dict[str, str]:
    found = {}
    if facts.metrics:
        found["perplexity"] = charts.perplexity_chart(facts.models(), facts.datasets)
    if facts.allocation:
        found["bits"] = charts.bits_chart(facts.allocation["choices"])
    if len(set(facts.kept)) > 1:
        found["kept"] = charts.kept_chart(facts.kept)
    if facts.histories:
        found["loss"] = charts.loss_chart(facts.histories)
    if facts.recovery:
        found["scales"] = charts.scale_chart(facts.recovery["loss_by_scale"], facts.recovery["scale"])
    made = [row for row in facts.stages() if row.measured]
    if made:
        found["memory"] = charts.memory_chart(made)
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [[_inline(name) for name in head], ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[_inline(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _inline(text: str) -> str:
    """`text` as it stands, for Markdown: no markup of its own, no line ends."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]#|" else letter for letter in " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _replace(path: Path, text: str) -> Path:
    """Write the whole file or none of it."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
    return path

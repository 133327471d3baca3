import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.errors import ArtifactError
from qlora_pipe.known import CHAIN
from qlora_pipe.report import show_results, write_report
from qlora_pipe.report.facts import Kept, read_facts
from qlora_pipe.report.table import figure

HOSTILE = "<script>alert(1)</script>$\\frac{$|`[link](x)`\x1b[31m😀_"
Build = Callable[..., Any]


class Outline(HTMLParser):
    """Tags, ids and what would be fetched."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._attributes(attrs)

    def _attributes(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
            assert not name.startswith("on")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(run: Path) -> Outline:
    page = Outline(write_report(run).read_text())
    assert page.open == []
    return page


def drop_rows(*names: str) -> Callable[[Any], Any]:
    return lambda rows: [row for row in rows if row["model"] not in names]


def test_page_of_a_whole_run(run_builder: Build) -> None:
    run = run_builder().build()
    page = outline(run)
    assert write_report(run) == run / "report.html"
    assert page.tags.count("svg") == 5  # perplexity, scales, bits, loss, memory
    assert {"script", "img", "link", "iframe"}.isdisjoint(page.tags)
    # Clip paths and tick marks refer to themselves; nothing else is referred to.
    assert {reference[0] for reference in page.references} <= {"#"}
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    for told in ("proved optimal", "21.40", "14.20", "\u00d7 0.664", "scale 1", "Every layer keeps 2 of 2 KV groups"):
        assert told in page.text
    for manifest in read_facts(run).manifests.values():
        assert manifest.identity in page.text
        assert all(entry.sha256 in page.text for entry in manifest.files.values())


def test_charts_take_font_and_colours_from_the_page(run_builder: Build) -> None:
    run = run_builder().build()
    drawings = re.findall(r"<svg.*?</svg>", write_report(run).read_text(), re.DOTALL)
    for drawing in drawings:
        assert "<text" in drawing
        assert "DejaVu" not in drawing
        assert "0b5e" not in drawing
        assert "<style" not in drawing
        assert drawing.count("var(--font)") == drawing.count("<text")
        # Whatever is drawn in a fixed colour would vanish in one of the two schemes.
        assert re.findall(r"#[0-9a-f]{3,6}\b", drawing) == []


def test_cells_tell_bits_and_all_of_their_choice(run_builder: Build) -> None:
    run = run_builder().build()
    page = write_report(run).read_text()
    choices = json.loads((run / "allocate" / "allocation.json").read_text())["choices"]
    for name, choice in choices.items():
        told = f"{name}: {choice['bits']} bits, blocks of {choice['block_size']}, rank {choice['rank']}, "
        assert told in page
    drawing = page[page.index('aria-label="Code bits') :]
    drawing = drawing[: drawing.index("</svg>")]
    for bits in {choice["bits"] for choice in choices.values()}:
        count = sum(choice["bits"] == bits for choice in choices.values())
        assert drawing.count(f"fill: var(--bits-{bits})") == count


def test_report_is_the_same_twice(run_builder: Build) -> None:
    run = run_builder().build()
    first = (write_report(run).read_bytes(), (run / "report.md").read_bytes())
    assert (write_report(run).read_bytes(), (run / "report.md").read_bytes()) == first
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize("until", ["source", "allocate", "prune", "train", "recover", "evaluate"])
def test_a_run_that_was_cut_short(run_builder: Build, until: str) -> None:
    run = run_builder().build(until)
    page, shown = outline(run), show_results(run)
    left = len(CHAIN) - 1 - CHAIN.index(until)
    assert page.text.count(": not run") == left
    assert until in shown
    assert ("nothing is evaluated yet" in shown) == (until != "evaluate")


def test_a_run_without_plan_stats_and_settings(run_builder: Build) -> None:
    run = run_builder().build()
    for name in ("plan.json", "stats.json", "config.yaml"):
        (run / name).unlink()
    assert "memory-" not in " ".join(outline(run).ids)
    assert "21.40" in show_results(run)


def test_compact_skipped(run_builder: Build) -> None:
    run = run_builder(compact=False).build()
    page = outline(run)
    assert "compact: skipped" in page.text
    assert "Un-quantise" not in page.text
    assert "compact (skipped)" in show_results(run)
    assert "compact" not in [row.name for row in read_facts(run).models()]


def test_what_files_say_is_escaped(run_builder: Build) -> None:
    def hostile(body: dict[str, Any]) -> dict[str, Any]:
        return body | {"model_type": HOSTILE}

    def rename(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"model": row["model"] + HOSTILE, "dataset": HOSTILE + row["dataset"]} for row in rows]

    edits = {"source/source.json": hostile, "evaluate/metrics.json": rename}
    run = run_builder(model=HOSTILE.replace("\x1b", ""), evaluation=("c4",), edits=edits).build()
    text = write_report(run).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "script" not in outline(run).tags
    markdown = (run / "report.md").read_text()
    assert "<script" not in markdown
    for line in markdown.splitlines():
        if "alert" in line and line.startswith("|"):
            assert re.search(r"(?<!\\)\[", line) is None
    shown = show_results(run)
    assert "\x1b" not in shown
    assert "alert(1)" in shown


def test_markdown_tables_have_their_columns(run_builder: Build) -> None:
    run = run_builder(evaluation=("wiki", "c4")).build()
    metrics = run / "evaluate/metrics.json"
    metrics.write_text(metrics.read_text().replace('"wiki"', '"a|b"'))
    write_report(run)
    blocks = re.findall(r"(?:^\|.*\n)+", (run / "report.md").read_text(), re.MULTILINE)
    assert len(blocks) == 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_terminal_table(run_builder: Build) -> None:
    run = run_builder(evaluation=("c4", "code")).build()
    lines = show_results(run).splitlines()
    assert lines[0].split("  ")[0] == "model"
    for name in ("perplexity task", "perplexity c4", "perplexity code"):
        assert name in lines[0]
    base = next(line for line in lines if line.startswith("base"))
    assert base.split()[1:] == ["21.40", "40.66", "59.92", "32.000", "538.00", "MB"]
    assert "tau) 0.83" in "\n".join(lines)
    assert "+0.0213 nats per token, 10 % of what it gained" in "\n".join(lines)
    calibrate = next(line for line in lines if line.startswith("calibrate"))
    assert calibrate.split()[1:6] == ["5.0", "710.00", "MB", "725.00", "MB"]
    assert "0.98" in calibrate
    assert "\x1b" not in "\n".join(lines)


def test_colours_on_a_terminal_only(run_builder: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_builder().build()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[1m" in show_results(run)


def test_an_adapter_that_does_not_help_says_so(run_builder: Build) -> None:
    edit = {"recover/recovery.json": lambda body: body | {"scale": 0.0, "tau": 0.0}}
    run = run_builder(edits=edit).build()
    assert "does not help the original full model" in show_results(run)
    assert 'class="verdict warn"' in write_report(run).read_text()
    assert "does not help" in (run / "report.md").read_text()


def test_a_scale_at_the_edge_of_what_was_tried_says_so(run_builder: Build) -> None:
    assert "No larger scale was tried" not in show_results(run_builder().build("recover"))
    edit = {"recover/recovery.json": lambda body: body | {"scale": 1.25}}
    assert "No larger scale was tried" in show_results(run_builder(edits=edit).build("recover"))


def test_no_gain_leaves_tau_undefined(run_builder: Build) -> None:
    def edit(body: dict[str, Any]) -> dict[str, Any]:
        return body | {"tau": None, "unquantise_gap": body["unquantise_gap"] | {"share": None}}

    run = run_builder(edits={"recover/recovery.json": edit}).build()
    outline(run)
    assert "not defined, for the small model gained nothing" in show_results(run)
    assert "nats per token, which gained nothing" in show_results(run)


def test_layers_that_keep_different_widths_are_drawn(run_builder: Build) -> None:
    def edit(body: dict[str, Any]) -> dict[str, Any]:
        body["layers"][1] |= {"kv_heads": "1", "ffn": "0-15,20,22-24"}
        return body

    run = run_builder(edits={"select/kept.json": edit}).build("train")
    assert read_facts(run).kept[1] == Kept(1, 2, 20, 128)
    page = outline(run)
    assert "Layers differ: 1 to 2 of 2 KV groups and 20 to 64 of 128 FFN channels are kept." in page.text
    assert any(name.startswith("kept-") for name in page.ids)


def test_how_much_goes_is_told_with_its_certificate(run_builder: Build) -> None:
    proof = {"optimal": False, "gap": 0.0123, "bound": 4.5}
    solved = {"ratio": 0.3, "loss": 4.6, "loss_uniform": 7.25, "certificate": proof}
    text = outline(run_builder().build("select")).text
    assert "64 of 128 FFN channels. Scores: activation. True reduction: 33.22 % of the blocks' parameters." in text
    assert "Certificate" not in text[text.index("True reduction") :]
    text = outline(run_builder(edits={"select/selection.json": lambda body: body | solved}).build("select")).text
    assert "parameters, at least 30 % asked for." in text
    assert "Score that goes: 4.6. With uniform widths: 7.25. Certificate: within 1.23 % of the optimum, no" in text
    measured = solved | {"measured": {"layers.0.ffn": 9.0}}
    text = outline(run_builder(edits={"select/selection.json": lambda body: body | measured}).build("select")).text
    assert "Measured loss, nats a token: 4.6. With uniform widths" in text


def test_a_wide_range_of_perplexities_is_logarithmic(run_builder: Build) -> None:
    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row | {"perplexity": 3.1e5} if row["model"] == "pruned" else row for row in rows]

    def figures(run: Path) -> set[str]:
        text = write_report(run).read_text()
        return set(re.findall(r">([\d.,kM]+)</text>", text[: text.index("The recovered adapter")]))

    assert {"20", "40.66"} <= figures(run_builder().build())
    assert {"1", "10k", "310,000"} <= figures(run_builder(edits={"evaluate/metrics.json": edit}).build())


def test_a_deep_model_takes_bands_of_equal_width(run_builder: Build) -> None:
    page = outline(run_builder(layers=45).build("allocate"))
    assert sum(name.startswith("bits-cell-") for name in page.ids) == 45 * 7
    assert {"bits-axes_1", "bits-axes_2"} == {name for name in page.ids if name.startswith("bits-axes")}


@pytest.mark.parametrize("evaluation", [(), ("a", "b", "c", "d")])
def test_any_number_of_data_sets(run_builder: Build, evaluation: tuple[str, ...]) -> None:
    run = run_builder(evaluation=evaluation).build()
    assert read_facts(run).datasets == ["task", *evaluation]
    outline(run)


def test_one_step_of_training_is_drawn(run_builder: Build) -> None:
    run = run_builder(edits={"train/history.json": lambda rows: rows[:1]}).build("train")
    assert any(name.startswith("loss-") for name in outline(run).ids)


@pytest.mark.parametrize(
    ("value", "told"),
    [(None, "-"), (21.404, "21.40"), (999.996, "1000.00"), (31000.4, "31,000"), (2.5e9, "2.50e+09")],
)
def test_figures(value: float | None, told: str) -> None:
    assert figure(value) == told


def test_no_run_and_a_broken_file_are_typed_errors(run_builder: Build, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a run folder, found none"):
        show_results(tmp_path / "nothing")
    run = run_builder().build()
    (run / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"plan\.json: expected JSON"):
        write_report(run)


def test_figures_of_other_settings_are_marked_stale(run_builder: Build) -> None:
    run = run_builder().build()
    manifest = run / "prune/manifest.json"
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(body | {"identity": "0" * 64}))
    page = write_report(run).read_text()
    assert "train: stale" in page
    assert "evaluate: stale" in page
    assert "decompose: stale" not in page

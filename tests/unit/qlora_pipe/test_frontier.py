import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError, ConfigError, SourceError
from qlora_pipe.events import Reporter
from qlora_pipe.frontier import ROWS, read_curve, render_curve, show_frontier

DECOMPOSE = {"budget": "4bits", "bits": [2, 3, 4], "block_sizes": [16, 32], "ranks": [0, 4], "iterations": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to decompose."""
    folder = tmp_path_factory.mktemp("frontier")
    save_tiny_model(folder / "model")
    save_texts(folder)
    compile_model(load(save_settings(folder, decompose=DECOMPOSE)), Reporter(), until="decompose")
    return folder / "run"


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def settle(run: Path, **decompose: Any) -> Path:
    """Change settings in the run's own configuration."""
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["decompose"] |= decompose
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    return run


def table_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((run / "score/table.json").read_text())


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_the_curve_spans_the_table(made: Path) -> None:
    curve, table = read_curve(made), table_of(made)
    costs = [point.bytes for point in curve.vertices]
    losses = [point.loss for point in curve.vertices]
    assert all(a < b for a, b in itertools.pairwise(costs))
    assert all(a > b for a, b in itertools.pairwise(losses))
    # A shape's sizes are alike among tied matrices here, so the ends are those of every matrix alone.
    assert costs[0] == sum(min(row["bytes"] for row in rows) for rows in table.values())
    assert losses[-1] <= sum(rows[-1]["loss"] for rows in table.values())
    weights = 8 * costs[0] / curve.vertices[0].bits_per_weight
    assert [point.bits_per_weight for point in curve.vertices] == [8 * cost / weights for cost in costs]


def test_rows_are_evenly_spaced_and_marked(made: Path) -> None:
    curve = read_curve(made)
    plain = [row for row in curve.rows if not row.chosen]
    assert 5 < len(plain) <= ROWS
    assert (plain[0].bytes, plain[-1].bytes) == (curve.vertices[0].bytes, curve.vertices[-1].bytes)
    step = (plain[-1].bytes - plain[0].bytes) / (ROWS - 1)
    for number in range(ROWS):
        # The best vertex within each of the evenly spaced sizes is a row.
        room = plain[0].bytes + number * step + 0.5
        assert max(point.bytes for point in curve.vertices if point.bytes <= room) in {row.bytes for row in plain}
    assert [row.bytes for row in curve.rows] == sorted(row.bytes for row in curve.rows)
    body = json.loads((made / "allocate/allocation.json").read_text())
    assert curve.chosen is not None
    assert (curve.chosen.bytes, curve.chosen.loss) == (body["bytes"], body["loss"])


def test_the_bytes_of_the_whole_model_are_those_written(made: Path) -> None:
    curve = read_curve(made)
    assert curve.chosen is not None
    assert curve.chosen.artifact_bytes == (made / "decompose/model.safetensors").stat().st_size
    for row in curve.rows:
        assert 0 <= row.budget_bytes - row.artifact_bytes < 1000


@pytest.mark.parametrize("number", [0, 3, 9])
def test_a_vertex_is_what_the_run_would_take_at_its_budget(made: Path, tmp_path: Path, number: int) -> None:
    """Bytes of the whole model as the budget: the stage allocates that vertex."""
    point = read_curve(made).vertices[number]
    settings = (f"decompose.budget={point.budget_bytes}B", f"run={tmp_path / 'run'}")
    shutil.copytree(made, tmp_path / "run", symlinks=True)
    artifacts = compile_model(load(made.parent / "tiny.yaml", settings), Reporter(), until="allocate")
    body = json.loads((artifacts["allocate"].folder / "allocation.json").read_text())
    assert body["bytes"] == point.bytes
    assert body["loss"] == pytest.approx(point.loss, rel=1e-9)


def test_rules_and_ties_of_the_run_hold(copied: Path) -> None:
    free = read_curve(copied)
    untied = read_curve(settle(copied, ties=[]))
    assert len(untied.vertices) > len(free.vertices)
    floored = read_curve(settle(copied, rules=[{"min_bits": 3}]))
    table = table_of(copied)
    least = sum(min(row["bytes"] for row in rows if row["bits"] >= 3) for rows in table.values())
    assert floored.vertices[0].bytes == least


def test_text_and_files(made: Path, tmp_path: Path) -> None:
    shown = show_frontier(made, tmp_path / "curve.json", tmp_path / "curve.png")
    curve = read_curve(made)
    assert shown == render_curve(curve)
    body = json.loads((tmp_path / "curve.json").read_text())
    assert [point["bytes"] for point in body["vertices"]] == [point.bytes for point in curve.vertices]
    assert set(body["vertices"][0]) == {"bits_per_weight", "bytes", "budget_bytes", "loss"}
    assert sum(row["chosen"] for row in body["rows"]) == 1
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    lines = [line for line in shown.splitlines() if "KB" in line]
    assert len(lines) == len(curve.rows)
    marked = [line for line in lines if "<- this run, 4bits" in line]
    assert len(marked) == 1
    assert " 1.000 " in marked[0]


def test_pictures_are_the_same_every_time(made: Path, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        show_frontier(made, plot=tmp_path / name)
    picture = (tmp_path / "a.svg").read_text()
    assert picture == (tmp_path / "b.svg").read_text()
    # The report's blue in its light form, and none of the placeholders that stand for colours there.
    assert "#1f66c1" in picture
    assert "#0b5e" not in picture


def test_a_run_without_allocation_has_no_mark(copied: Path) -> None:
    (copied / "allocate").unlink()
    curve = read_curve(copied)
    assert curve.chosen is None
    assert "this run" not in render_curve(curve)


def test_an_allocation_from_another_table_is_not_marked(copied: Path) -> None:
    manifest = (copied / "allocate").resolve() / "manifest.json"
    edit(manifest, lambda body: body | {"inputs": {"score": "0" * 64}})
    assert read_manifest(copied / "allocate").inputs["score"] == "0" * 64
    assert read_curve(copied).chosen is None


def test_no_table_yet(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected a run folder with an error table, found none; .*score CONFIG"):
        show_frontier(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: [1],
        lambda table: {name: [{"bits": 2}] for name in table},
        lambda table: {name: [rows[0] | {"loss": -1.0}] for name, rows in table.items()},
        lambda table: {"odd": next(iter(table.values()))},
    ],
)
def test_a_damaged_table(copied: Path, change: Callable[[Any], Any]) -> None:
    edit((copied / "score").resolve() / "table.json", change)
    with pytest.raises(ArtifactError, match="expected a whole error table"):
        show_frontier(copied)


def test_a_table_of_other_settings(copied: Path) -> None:
    with pytest.raises(ArtifactError, match=r"measured with other settings than config\.yaml has"):
        show_frontier(settle(copied, damping=0.5))


def test_the_model_is_gone(copied: Path) -> None:
    (copied / "base").unlink()
    with pytest.raises(SourceError, match=r"base: expected a model folder"):
        show_frontier(copied)


def test_files_that_cannot_be_written(made: Path, tmp_path: Path) -> None:
    for options in ({"table": tmp_path / "no/a.json"}, {"plot": tmp_path / "no/a.png"}):
        with pytest.raises(ConfigError, match=r"no/a.*: expected a path that can be written, found No such file"):
            show_frontier(made, **options)
    with pytest.raises(ConfigError, match=r"--plot .*a\.gif: expected a file name that ends in \.png or \.svg"):
        show_frontier(made, plot=tmp_path / "a.gif")

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.artifacts.store import STATE, Store
from qlora_pipe.errors import ArtifactError
from qlora_pipe.events import Reporter
from qlora_pipe.known import CHAIN
from qlora_pipe.status import show_status


@pytest.fixture
def run(run_builder: Callable[..., Any]) -> Path:
    return run_builder().build()


def reporter(run: Path) -> Reporter:
    made = Reporter(stream=io.StringIO())
    made.state = run / STATE
    return made


def later(run: Path, seconds: float) -> None:
    """As if the run had been heard of so long before."""
    state = json.loads((run / STATE).read_text())
    for body in filter(None, state.values()):
        body["time"] -= seconds
    (run / STATE).write_text(json.dumps(state))


def rows(text: str) -> dict[str, str]:
    return {
        line.split()[0]: line.split()[1] for line in text.splitlines() if line.split()[:1] and line.split()[0] in CHAIN
    }


def snapshot(run: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in (run, *run.rglob("*"))}


def test_a_running_run(run: Path) -> None:
    with Store(run).lock():
        events = reporter(run)
        events.note("begin", "running up to evaluate")
        assert "time left: unknown" in show_status(run)
        events.stage = "train"
        events.event("start", "starting")
        text = show_status(run)
        assert f"running, process {os.getpid()} on " in text
        assert "train, since 2" in text
        assert "time left: unknown" in text
        with events.progress("training", 40) as advance:
            time.sleep(0.2)
            advance("row 1")
            events.event("note", "in between")
            before = snapshot(run)
            text = show_status(run)
            assert snapshot(run) == before
            assert "training, 1 of 40 (row 1); time left of this: about 0:00:0" in text
            assert "of the stages after it: unknown" in text
            later(run, 3)
            assert "about 0:00:0" in show_status(run)
            # A step that takes longer than all that was expected.
            later(run, 3600)
            assert "time left of this: unknown" in show_status(run)
            later(run, -7200)
            assert "time left of this: unknown" in show_status(run)
        table = rows(text)
        assert [table[name] for name in ("source", "align", "train", "compact")] == ["done", "done", "at", "-"]
        (run / STATE).write_text("{")
        assert "time left: unknown" in show_status(run)


@pytest.mark.parametrize("kind", ["made", "done"])
def test_a_stage_that_is_done_is_not_at_work(run: Path, kind: str) -> None:
    with Store(run).lock():
        events = reporter(run)
        events.stage = "train"
        events.event(kind, "done")
        text = show_status(run)
        assert "between stages" in text
        assert rows(text)["train"] == "done"


def test_a_finished_run(run: Path) -> None:
    reporter(run).note("end", "done up to evaluate")
    before = snapshot(run)
    text = show_status(run)
    assert snapshot(run) == before
    assert "done up to evaluate" in text
    assert set(rows(text).values()) == {"done"}
    (run / "stats.json").write_text(json.dumps({"train": {"seconds": 3.25, "peak_bytes": 2e9}}))
    assert ["train", "done", "3.25", "2.00"] in [line.split() for line in show_status(run).splitlines()]


def test_a_run_that_failed_or_was_killed(run: Path) -> None:
    events = reporter(run)
    events.stage = "compact"
    with events.progress("training", 8) as advance:
        advance()
        assert "dead in compact" in show_status(run)
        assert "it goes on from there" in show_status(run)
    events.note("failed", "StageError: the loss is nan")
    assert ": StageError: the loss is nan" in show_status(run)
    (run / STATE).unlink()
    assert "is unknown" in show_status(run)


def test_what_is_missing_or_stale_is_not_done(run: Path) -> None:
    (run / "evaluate").unlink()
    (run / "select").unlink()
    text = show_status(run)
    assert rows(text) | {"select": "-", "prune": "stale:", "evaluate": "-", "calibrate": "done"} == rows(text)
    assert "stale: select is another now" in text


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a run folder, found none"):
        show_status(tmp_path)
    with pytest.raises(ArtifactError, match="expected a run folder"):
        show_status(tmp_path / "nowhere")

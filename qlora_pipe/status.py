"""How far a run is: what its process last said of itself, its lock, its manifests. Writes nothing, needs no torch."""

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from qlora_pipe.artifacts.manifest import Manifest, read_manifest
from qlora_pipe.artifacts.store import STATE, owner
from qlora_pipe.errors import ArtifactError
from qlora_pipe.known import CHAIN
from qlora_pipe.report.facts import read_json
from qlora_pipe.report.table import render

_UNKNOWN = "unknown"


def show_status(run: Path) -> str:
    """Who works in the folder `run`, at which stage, since when and how long yet; and every stage, in a page of text.

    Raises ArtifactError if `run` is no run folder. A run that is killed, or whose machine went down, says nothing of
    its end: it is told by its lock, which no process holds.
    """
    # In this order: a run that ends in between is said to have ended.
    working = owner(run)
    state, whole = _state(run), {name: _manifest(run / name) for name in CHAIN}
    if not state and not any(whole.values()):
        raise ArtifactError(
            f"{run}: expected a run folder, found none; give the folder that `run:` names in the configuration"
        )
    last = state.get("last", {})
    at = _at(last) if working else None
    lines = [f"run {run}: {_running(working, last) if working else _ended(last)}"]
    if working:
        lines.append(_work(at, last, state.get("progress")))
    return "\n".join(lines) + "\n\n" + render(("stage", "", "seconds", "peak GB"), _rows(run, whole, at), 2)


def _running(working: str, last: dict[str, Any]) -> str:
    return f"running, {working}" + (f", last heard of {_ago(last['time'])}" if last else "")


def _ended(last: dict[str, Any]) -> str:
    """What became of a run that no process works at."""
    match last.get("event"):
        case None:
            return "nobody works here, and what became of the last run is unknown"
        case "end":
            return f"ended {_ago(last['time'])}, {last['message']}"
        case "failed":
            return f"failed {_ago(last['time'])}{_where(last)}: {last['message']}"
    return (
        f"dead{_where(last)}, last heard of {_ago(last['time'])}: its process was killed, or the machine went down; "
        "run it again, it goes on from there"
    )


def _where(last: dict[str, Any]) -> str:
    return f" in {last['stage']}" if last["stage"] else ""


def _at(last: dict[str, Any]) -> str | None:
    """The stage that is at work, None between stages: what a stage says last is that it is done."""
    return None if last.get("event") in ("made", "done") else last.get("stage") or None


def _work(at: str | None, last: dict[str, Any], progress: dict[str, Any] | None) -> str:
    """The stage that is at work, and how far it says it is."""
    if at is None:
        return f"between stages, time left: {_UNKNOWN}"
    since = f"{at}, since {_clock(last['time'] - last['seconds'])}"
    if progress is None:
        return f"{since}, time left: {_UNKNOWN}"
    item = f" ({progress['item']})" if "item" in progress else ""
    left = progress["seconds_left"] - (time.time() - progress["time"])
    # A step that takes longer than those before it has shown the estimate to be wrong.
    told = f"about {_span(left)}" if 0 <= left <= progress["seconds_left"] else _UNKNOWN
    return (
        f"{since}: {progress['message']}, {progress['done']} of {progress['total']}{item}; time left of this: {told}, "
        f"of the stages after it: {_UNKNOWN}"
    )


def _rows(run: Path, whole: dict[str, Manifest | None], at: str | None) -> list[tuple[str, str, str, str]]:
    """A stage that follows the one at work is not done, whatever an earlier run left there."""
    stats = read_json(run / "stats.json")
    measured = stats if isinstance(stats, dict) else {}
    rows, passed = [], True
    for name, manifest in whole.items():
        passed = passed and name != at
        told = "at work" if name == at else _verdict(manifest, whole) if passed else "-"
        figures = measured.get(name, {}) if told == "done" else {}
        seconds, peak = figures.get("seconds"), figures.get("peak_bytes")
        rows.append((name, told, _figure(seconds, 1), _figure(peak, 1e9)))
    return rows


def _verdict(manifest: Manifest | None, whole: dict[str, Manifest | None]) -> str:
    if manifest is None:
        return "-"
    for name, made_from in manifest.inputs.items():
        if name in CHAIN and getattr(whole[name], "identity", None) != made_from:
            return f"stale: {name} is another now"
    return "done"


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtifactError:
        return None


def _state(run: Path) -> dict[str, Any]:
    """The last event and the last progress, {} where there is none that can be understood."""
    kinds: dict[str, Any] = {"time": (int, float), "seconds": (int, float), "event": str, "stage": str, "message": str}
    counts: dict[str, Any] = {"done": int, "total": int, "seconds_left": (int, float)}
    try:
        state = json.loads((run / STATE).read_text())
        for body, expected in ((state["last"], kinds), (state["progress"], kinds | counts)):
            if body is None:
                continue
            if not all(isinstance(body[key], kind) for key, kind in expected.items()) or not 0 <= body["time"] < 2**33:
                return {}
        return state
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _ago(moment: float) -> str:
    return f"{_clock(moment)} ({_span(time.time() - moment)} ago)"


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment).isoformat(" ", "seconds")


def _span(seconds: float) -> str:
    """h:mm:ss; a clock that was set back makes no negative time."""
    return str(timedelta(seconds=round(max(0.0, seconds))))


def _figure(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.2f}"

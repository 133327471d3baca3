import io
import json
import time
from pathlib import Path

import pytest

from qlora_pipe.cli import _opened
from qlora_pipe.events import Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


MESSAGES = [
    "[bold]not markup[/bold]",
    "[/]",
    "a list [1, 2] and [red]",
    "at 12:100: and :smile:",
    "ends in a backslash \\",
    "x" * 500,
    "ünïcode ≤",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_printed_as_it_is(message: str) -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.event("note", message)
    assert stream.getvalue() == message + "\n"
    reporter.stage = "train"
    reporter.event("note", message)
    assert stream.getvalue().splitlines()[1] == f"     train  {message}"


@pytest.mark.parametrize("message", MESSAGES)
def test_json_lines_parse(message: str) -> None:
    stream = io.StringIO()
    reporter = Reporter(json_lines=True, stream=stream)
    reporter.stage = "train"
    reporter.event("made", message, seconds=1.5, files=["a"])
    reporter.event("done", "two\nlines")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time") > 0
    assert 0 <= second.pop("seconds") < 60
    assert first == {"event": "made", "stage": "train", "message": message, "seconds": 1.5, "files": ["a"]}
    assert second["message"] == "two\nlines"


def test_progress_as_json() -> None:
    stream = io.StringIO()
    reporter = Reporter(json_lines=True, stream=stream)
    with reporter.progress("layers", 3) as advance:
        for _ in range(3):
            advance()
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(row["event"], row["message"], row["done"], row["total"]) for row in rows] == [
        ("progress", "layers", done, 3) for done in (1, 2, 3)
    ]


def test_nothing_but_lines_when_not_a_terminal() -> None:
    stream = io.StringIO()
    reporter = Reporter(stream=stream)
    reporter.stage = "score"
    with reporter.progress("layers", 2) as advance:
        advance()
        reporter.event("note", "inside")
        advance()
    assert stream.getvalue() == "     score  inside\n"


@pytest.mark.parametrize("label", ["layers", "[red] layers [1]", "12:100: layers"])
def test_a_bar_on_a_terminal(label: str) -> None:
    stream = Terminal()
    reporter = Reporter(stream=stream)
    reporter.stage = "score"
    with reporter.progress(label, 2) as advance:
        advance()
        reporter.event("note", "inside")
        advance()
    shown = stream.getvalue()
    assert f"score  {label}" in shown
    assert "2/2" in shown
    assert "inside" in shown


def test_a_bar_ends_with_an_error() -> None:
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), Reporter(stream=stream).progress("layers", 2):
        raise ZeroDivisionError
    # The cursor is shown again.
    assert stream.getvalue().rstrip().count("\x1b[?25h") == stream.getvalue().count("\x1b[?25l") == 1


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    Reporter().event("note", "words")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "words\n")


def test_a_log_gets_everything_beside_what_people_read() -> None:
    stream, log = Terminal(), io.StringIO()
    reporter = Reporter(stream=stream, log=log)
    reporter.stage = "train"
    with reporter.progress("training", 2) as advance:
        advance("layer 0")
        reporter.event("note", "inside")
        reporter.note("begin", "for tools")
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [row["event"] for row in rows] == ["progress", "note", "begin"]
    assert (rows[0]["item"], rows[0]["stage"]) == ("layer 0", "train")
    assert "inside" in stream.getvalue()
    assert "for tools" not in stream.getvalue()


def test_seconds_do_not_follow_a_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    reporter = Reporter(stream=io.StringIO(), log=log)
    reporter.stage = "train"
    with reporter.progress("training", 4) as advance:
        advance()
        monkeypatch.setattr(time, "time", lambda: 0.0)
        advance()
    rows = [json.loads(line) for line in log.getvalue().splitlines()]
    assert rows[1]["time"] == 0
    assert all(0 <= row["seconds"] < 60 and 0 <= row["seconds_left"] < 60 for row in rows)


def test_the_state_is_the_last_event_and_the_progress_under_way(tmp_path: Path) -> None:
    reporter = Reporter(stream=io.StringIO())
    reporter.state = tmp_path / "state.json"
    reporter.stage = "score"
    with reporter.progress("layers", 2) as advance:
        advance()
        reporter.event("note", "words")
        state = json.loads(reporter.state.read_text())
        assert (state["last"]["message"], state["progress"]["done"]) == ("words", 1)
    reporter.event("made", "done")
    assert json.loads(reporter.state.read_text())["progress"] is None
    assert list(tmp_path.iterdir()) == [reporter.state]
    # Where nothing can be written, the work goes on.
    reporter.state = tmp_path / "nowhere" / "state.json"
    reporter.event("note", "words")


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """/dev/full takes no byte, when it is flushed or closed either."""
    with _opened(False, Path("/dev/full")) as reporter:
        reporter.state = tmp_path / "state.json"
        reporter.event("note", "one")
        reporter.event("note", "two")
        assert json.loads(reporter.state.read_text())["last"]["message"] == "two"
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "the log cannot be written (No space left on device): lines of it are missing, the run goes on"
    assert others == ["one", "two"]

import io
import json

import pytest

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

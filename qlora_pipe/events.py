"""What the user sees while a run works: rich progress on a terminal, plain lines elsewhere, JSON lines on request."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[], None]


class Reporter:
    """Told of everything; passed explicitly. `json_lines` replaces all else by one JSON object a line."""

    def __init__(self, *, json_lines: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._json = json_lines
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self.stage = ""

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """One thing that happened; `message` is for people, `fields` for tools."""
        if self._json:
            body = {
                "time": round(time.time(), 3),
                "event": kind,
                "stage": self.stage,
                "message": message,
                **fields,
            }
            print(json.dumps(body), file=self._stream, flush=True)
        else:
            # Text, not markup: brackets, emoji codes and backslashes of a message are its own.
            prefix = (f"{self.stage:>10}", "bold") if self.stage else ""
            self._console.print(Text.assemble(prefix, "  " if self.stage else "", message))

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """A bar with the time that is left; on no terminal nothing but the JSON events."""
        done = 0
        if not self._json and self._console.is_terminal:
            columns = (
                TextColumn(f"{self.stage:>10}  {{task.description}}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
            )
            with Progress(
                *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, transient=True
            ) as bar:
                task = bar.add_task(label, total=total)
                yield lambda: bar.advance(task)
            return

        def advance() -> None:
            nonlocal done
            done += 1
            if self._json:
                self.event("progress", label, done=done, total=total)

        yield advance

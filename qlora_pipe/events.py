"""What the user sees while a run works: rich progress on a terminal, plain lines elsewhere, JSON lines on request; and
what another process can ask after, in one small file."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

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


class Advance(Protocol):
    """One more is done: `item`, where it has a name that tells more than its number."""

    def __call__(self, item: str = "") -> None: ...


class Reporter:
    """Told of everything; passed explicitly. `json_lines` replaces all else by one JSON object a line; `log` gets
    these lines beside what people read; what it cannot take is left out, and that is said once. `state`, where it is
    set, is a file that holds the last event and how far the work is, whole at any moment."""

    def __init__(self, *, json_lines: bool = False, stream: TextIO | None = None, log: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._json = json_lines
        self._log = self._stream if json_lines else log
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        self._under_way: dict[str, Any] | None = None
        self._complained = False
        self.state: Path | None = None
        self.stage = ""

    @property
    def stage(self) -> str:
        """The stage that is at work, "" between stages."""
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        # No clock that can be set: seconds are right whatever becomes of the time of day.
        self._stage, self._began = name, time.monotonic()

    def event(self, kind: str, message: str, **fields: Any) -> None:
        """One thing that happened; `message` is for people, `fields` for tools."""
        self.note(kind, message, **fields)
        if not self._json:
            # Text, not markup: brackets, emoji codes and backslashes of a message are its own.
            prefix = (f"{self.stage:>10}", "bold") if self.stage else ""
            self._console.print(Text.assemble(prefix, "  " if self.stage else "", message))

    def note(self, kind: str, message: str, **fields: Any) -> None:
        """An event for tools alone. `seconds` are those since the stage began, where `fields` say nothing else."""
        if self._log is None and self.state is None:
            return
        body = {
            "time": round(time.time(), 3),
            "event": kind,
            "stage": self.stage,
            "message": message,
            "seconds": round(time.monotonic() - self._began, 3),
            **fields,
        }
        if kind == "progress":
            self._under_way = body
        if self.state is not None:
            self._keep({"last": body, "progress": self._under_way})
        if self._log is not None:
            self._add(json.dumps(body), self._log)

    def _add(self, line: str, log: TextIO) -> None:
        try:
            print(line, file=log, flush=True)
        except OSError as error:
            # Where these lines are all that is said, there is no other place to say so.
            if self._json:
                raise
            if not self._complained:
                self._complained = True
                said = f"the log cannot be written ({error.strerror}): lines of it are missing, the run goes on"
                self._console.print(Text(said))

    def _keep(self, state: dict[str, Any]) -> None:
        assert self.state is not None
        fresh = self.state.with_suffix(".fresh")
        # Nobody's work is to end because what is said of it cannot be written.
        with suppress(OSError):
            fresh.write_text(json.dumps(state))
            os.replace(fresh, self.state)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Advance]:
        """A bar with the time that is left; on no terminal nothing but the events for tools, which say of each step
        how many are done and, in seconds, how long the others take if they take as long."""
        done, began = 0, time.monotonic()
        with self._bar(label, total) as turn:

            def advance(item: str = "") -> None:
                nonlocal done
                done += 1
                left = (time.monotonic() - began) * (total - done) / done
                turn(item)
                named = {"item": item} if item else {}
                self.note("progress", label, **named, done=done, total=total, seconds_left=round(left, 1))

            try:
                yield advance
            finally:
                self._under_way = None

    @contextmanager
    def _bar(self, label: str, total: int) -> Iterator[Advance]:
        if self._json or not self._console.is_terminal:
            yield lambda item="": None
            return
        columns = (
            TextColumn(f"{self.stage:>10}  {{task.description}}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        times = TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, *times, console=self._console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda item="": bar.advance(task)

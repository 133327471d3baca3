"""Records of a file: by templates, or in the forms that instruction data comes in; read when they are asked for."""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, overload

from qlora_pipe.config_data import Dataset
from qlora_pipe.errors import DataError

Fields = dict[str, Any]

ASSISTANT = "assistant"
_ROLES = ("system", "user", ASSISTANT)


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    text: str


@dataclass(frozen=True)
class Record:
    """One example. `prompt` is None for plain text.

    `earlier` is the chat before the prompt; `plain` takes the place of the prompt for a model without chat template.
    """

    prompt: str | None
    text: str
    earlier: tuple[Message, ...] = ()
    plain: str | None = None


class Records(Sequence[Record]):
    """Some records of a file, in an order of their own. Peak bytes: 8 for each, and those of the rows behind them."""

    def __init__(self, rows: Sequence[Fields], make: Callable[[int, Fields], Record], numbers: Sequence[int]) -> None:
        self._rows, self._make, self._numbers = rows, make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        """One record, or some of them, not read yet."""
        if isinstance(index, slice):
            return self.pick(range(len(self))[index])
        number = self._numbers[index]
        return self._make(number, self._rows[number])

    def pick(self, places: Sequence[int]) -> "Records":
        """Those at these places, in this order."""
        return Records(self._rows, self._make, array("q", (self._numbers[place] for place in places)))


def read_records(path: Path, dataset: Dataset) -> Records:
    """All records of a file that are not empty or excluded; every one is checked. Raises DataError.

    Lines of a JSONL file are read when they are asked for; a JSON file is held whole.
    """
    rows = JsonLines(path) if path.suffix == ".jsonl" else _whole(path)
    make, key = _FORMS[dataset.format](path, dataset)
    kept = array("q")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: expected records (JSON objects), found something else; use a list of objects")
        if make(number, row).text.strip() and (key is None or str(row.get(key)) not in dataset.exclude):
            kept.append(number)
    if not kept:
        raise DataError(f"{path}: expected records, found none that are not empty or excluded")
    return Records(rows, make, kept)


class JsonLines(Sequence[Any]):
    """The JSON values of a file's lines. Peak bytes: 8 a line; raises DataError where one is not JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q", (start for start, line in self._lines() if line.strip()))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        # Not splitlines(): JSON strings may hold U+2028 and its like.
        start = 0
        try:
            with self._path.open("rb") as file:
                for line in file:
                    yield start, line
                    start += len(line)
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """The value of one line, or a list of some."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return _parsed(str(self._path), file.readline())

    def __iter__(self) -> Iterator[Any]:
        for number, (_, line) in enumerate(self._lines(), 1):
            if line.strip():
                yield _parsed(f"{self._path}: line {number}", line)


def read_text(path: Path) -> str:
    """A UTF-8 file; raises DataError."""
    try:
        return _decoded(str(path), path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error


def _whole(path: Path) -> list[Any]:
    """The objects of a JSON list, or the values of a JSON object."""
    body = _parsed(str(path), read_text(path).encode())
    rows = list(body.values()) if isinstance(body, dict) else body
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected records (JSON objects), found something else; use a list of objects")
    return rows


def _parsed(place: str, line: bytes) -> Any:
    try:
        return json.loads(_decoded(place, line))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: expected JSON or JSONL records, found {error}") from error


def _decoded(place: str, found: bytes) -> str:
    try:
        return found.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: expected UTF-8 text, found {error}; convert the file") from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: expected a readable file, found {error.strerror}")


Make = Callable[[int, Fields], Record]
"""(number, fields) of a row to its record."""

Form = Callable[[Path, Dataset], tuple[Make, str | None]]
"""To what makes records, and the field that `exclude` looks at."""


def _by_templates(path: Path, dataset: Dataset) -> tuple[Make, str | None]:
    prompt, text = dataset.prompt, dataset.response if dataset.prompt is not None else dataset.text
    assert text is not None

    def make(number: int, row: Fields) -> Record:
        asked = None if prompt is None else _fill(path, number, prompt, row)
        return Record(asked, _fill(path, number, text, row))

    return make, _first_field(prompt if prompt is not None else text)


def _alpaca(path: Path, dataset: Dataset) -> tuple[Make, str | None]:
    """Fields instruction, input (may be missing or empty) and output; Alpaca's headings without a chat template."""

    def make(number: int, row: Fields) -> Record:
        asked = _fill(path, number, "{instruction}", row)
        given, answer = str(row.get("input") or ""), _fill(path, number, "{output}", row)
        parts = [("Instruction", asked), ("Input", given), ("Response", "")]
        plain = "\n\n".join(f"### {name}:\n{text}" for name, text in parts if text or name == "Response")
        return Record(f"{asked}\n\n{given}" if given else asked, answer, plain=plain)

    return make, "instruction"


def _messages(path: Path, dataset: Dataset) -> tuple[Make, str | None]:
    """Field messages: a list of {role, content}, of which what follows the last answer is left out."""

    def make(number: int, row: Fields) -> Record:
        found = row.get("messages")
        chat = [_message(path, number, entry) for entry in found] if isinstance(found, list) else []
        while chat and chat[-1].role != ASSISTANT:
            chat.pop()
        if len(chat) < 2 or chat[-2].role != "user":
            raise DataError(
                f"{path}: record {number}: expected a field messages, a list of {{role, content}} with a turn of the "
                "user before the last of the assistant, found none; leave the record out, or use templates"
            )
        return Record(chat[-2].text, chat[-1].text, tuple(chat[:-2]))

    return make, None


_FORMS: dict[str, Form] = {"templates": _by_templates, "alpaca": _alpaca, "messages": _messages}


def _message(path: Path, number: int, entry: Any) -> Message:
    role, text = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
    if role not in _ROLES or not isinstance(text, str):
        raise DataError(
            f"{path}: record {number}: expected messages with a role ({', '.join(_ROLES)}) and a text content, found "
            f"{json.dumps(entry)[:80]}; convert the record, or leave it out"
        )
    return Message(role, text)


def _fill(path: Path, number: int, template: str, row: Fields) -> str:
    """Replace {field} by the record's value: plain names only, no attribute or index access."""
    pieces = []
    for literal, name, spec, conversion in _fields(template):
        pieces.append(literal)
        if name is None:
            continue
        if spec or conversion or name not in row:
            fields = ", ".join(sorted(row))
            raise DataError(f"{path}: record {number} has no field {name!r} for template {template!r}; it has {fields}")
        pieces.append("" if row[name] is None else str(row[name]))
    return "".join(pieces)


def _first_field(template: str) -> str | None:
    return next((name for _, name, _, _ in _fields(template) if name), None)


def _fields(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """(literal text, field name, format, conversion) of each piece; raises DataError."""
    try:
        return list(Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}; write a brace of the text twice") from error

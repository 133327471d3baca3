"""Texts and instruction records from files: read as data, split the same way every time."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from qlora_pipe.artifacts.manifest import file_digest
from qlora_pipe.config import Config, Dataset
from qlora_pipe.errors import DataError
from qlora_pipe.sources import find_file

Part = Literal["train", "heldout"]


@dataclass(frozen=True)
class Record:
    """One example. `prompt` is None for plain text."""

    prompt: str | None
    text: str


def fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the file behind a data set, part of the identity of every stage that reads it."""
    return file_digest(find_file(dataset.source))


def check(config: Config) -> None:
    """Refuse data that a later stage would: missing files, wrong templates, too little held out. Raises DataError."""
    for dataset in (config.data.calibration, config.data.task):
        load(dataset, "train", config.seed)
    for dataset in config.data.evaluation.values():
        load(dataset, "heldout", config.seed)
    held = load(config.data.task, "heldout", config.seed)
    if held[0].prompt is not None and len(held) <= config.recover.rows:
        raise DataError(
            f"{config.data.task.source}: {len(held)} records are held out, recover.rows takes {config.recover.rows} of "
            "them and evaluate needs others; give more records, a larger heldout share or fewer recover.rows"
        )


def load(dataset: Dataset, part: Part, seed: int) -> list[Record]:
    """The records of one part, in a seeded order that does not depend on the machine; raises DataError.

    A file without templates is one text: its first part trains, its end is held out.
    """
    path = find_file(dataset.source)
    if dataset.prompt is None and dataset.text is None:
        return [Record(None, _text_part(path, dataset.heldout, part))]
    records = _records(path, dataset)
    order = sorted(range(len(records)), key=lambda index: _rank(seed, index))
    held = round(len(records) * dataset.heldout)
    chosen = order[:held] if part == "heldout" else order[held:]
    if not chosen:
        raise DataError(f"{path}: the {part} part is empty ({len(records)} records, heldout {dataset.heldout})")
    return [records[index] for index in chosen]


def _rank(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()


def _text_part(path: Path, heldout: float, part: Part) -> str:
    text = _read(path)
    cut = round(len(text) * (1 - heldout))
    chosen = text[cut:] if part == "heldout" else text[:cut]
    if not chosen.strip():
        raise DataError(f"{path}: the {part} part of the text is empty; give a longer text or another heldout share")
    return chosen


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, found {error}; convert the file") from error
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, found {error.strerror}") from error


def _records(path: Path, dataset: Dataset) -> list[Record]:
    rows = _rows(path)
    found = []
    for number, row in enumerate(rows):
        if dataset.prompt is not None and dataset.response is not None:
            key = _first_field(dataset.prompt)
            prompt, text = (
                _fill(path, number, dataset.prompt, row),
                _fill(path, number, dataset.response, row),
            )
        else:
            key = _first_field(dataset.text or "")
            prompt, text = None, _fill(path, number, dataset.text or "", row)
        if text.strip() and (key is None or str(row.get(key)) not in dataset.exclude):
            found.append(Record(prompt, text))
    if not found:
        raise DataError(f"{path}: expected records, found none that are not empty or excluded")
    return found


def _rows(path: Path) -> Sequence[dict[str, Any]]:
    """The objects of a JSON list, the values of a JSON object, or the lines of a JSONL file."""
    text = _read(path)
    try:
        if path.suffix == ".jsonl":
            # Not splitlines(): JSON strings may hold U+2028 and its like.
            body = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON or JSONL records, found {error}") from error
    rows = list(body.values()) if isinstance(body, dict) else body
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected records (JSON objects), found something else; use a list of objects")
    return rows


def _fill(path: Path, number: int, template: str, row: dict[str, Any]) -> str:
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

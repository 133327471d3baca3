"""Texts and instruction records from files: read as data, split the same way every time."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qlora_pipe.artifacts.manifest import file_digest
from qlora_pipe.config import Config
from qlora_pipe.config_data import Dataset
from qlora_pipe.errors import DataError
from qlora_pipe.records import Record, read_records, read_text
from qlora_pipe.sources import find_file

Part = Literal["train", "heldout"]


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


def load(dataset: Dataset, part: Part, seed: int) -> Sequence[Record]:
    """The records of one part, in a seeded order that does not depend on the machine; raises DataError.

    A file without templates is one text: its first part trains, its end is held out.
    """
    path = find_file(dataset.source)
    if dataset.is_text:
        return [Record(None, _text_part(path, dataset.heldout, part))]
    records = read_records(path, dataset)
    order = sorted(range(len(records)), key=lambda index: _rank(seed, index))
    held = round(len(records) * dataset.heldout)
    chosen = order[:held] if part == "heldout" else order[held:]
    if not chosen:
        raise DataError(f"{path}: the {part} part is empty ({len(records)} records, heldout {dataset.heldout})")
    return records.pick(chosen)


def _rank(seed: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}:{index}".encode()).digest()


def _text_part(path: Path, heldout: float, part: Part) -> str:
    text = read_text(path)
    cut = round(len(text) * (1 - heldout))
    chosen = text[cut:] if part == "heldout" else text[:cut]
    if not chosen.strip():
        raise DataError(f"{path}: the {part} part of the text is empty; give a longer text or another heldout share")
    return chosen

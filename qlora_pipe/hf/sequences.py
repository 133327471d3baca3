"""Token rows, how short ones share a sequence, and how they become a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is not scored."""

_OPEN = 64
"""Sequences that may still take a row while rows are packed."""


@dataclass(frozen=True)
class Row:
    """One sequence: token ids, and the same as labels with IGNORED where nothing is scored.

    `lengths` are those of the rows that share it, none of which sees another; empty: it is one row.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    lengths: tuple[int, ...] = ()

    @property
    def scored(self) -> int:
        """Positions whose prediction counts; the first token has none."""
        return sum(label != IGNORED for label in self.labels[1:])


def take(found: Sequence[Row], tokens: int) -> list[Row]:
    """The first rows that together have at most `tokens` scored positions, at least one row."""
    chosen: list[Row] = []
    total = 0
    for row in found:
        if chosen and total + row.scored > tokens:
            break
        chosen.append(row)
        total += row.scored
    return chosen


class Packer:
    """Puts rows into sequences of at most `length` tokens, each into the first of the last 64 that has room for it.

    The first token of a row is predicted from nothing, so its label is IGNORED.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._sequences: list[list[Row]] = []
        self._left: list[int] = []

    def add(self, row: Row) -> int:
        """How many sequences there are, with this row in one of them."""
        size = len(row.input_ids)
        first = max(0, len(self._left) - _OPEN)
        place = next((n for n in range(first, len(self._left)) if self._left[n] >= size), None)
        if place is None:
            place = len(self._left)
            self._sequences.append([])
            self._left.append(self._length)
        self._sequences[place].append(row)
        self._left[place] -= size
        return len(self._left)

    def rows(self, most: int) -> list[Row]:
        """The first `most` sequences."""
        return [_joined(sequence) for sequence in self._sequences[:most]]


def _joined(rows: Sequence[Row]) -> Row:
    return Row(
        tuple(token for row in rows for token in row.input_ids),
        tuple(label for row in rows for label in (IGNORED, *row.labels[1:])),
        tuple(len(row.input_ids) for row in rows),
    )


def collate(batch: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded input_ids and labels, each [rows, longest], with an attention_mask; where rows share a sequence,
    with position_ids instead, which begin anew for each row and for the padding: transformers masks by that."""
    longest = max(len(row.input_ids) for row in batch)
    pads = [longest - len(row.input_ids) for row in batch]
    found = {
        "input_ids": torch.tensor([[*row.input_ids, *[0] * pad] for row, pad in zip(batch, pads, strict=True)]),
        "labels": torch.tensor([[*row.labels, *[IGNORED] * pad] for row, pad in zip(batch, pads, strict=True)]),
    }
    if any(row.lengths for row in batch):
        lengths = [(*(row.lengths or (len(row.input_ids),)), pad) for row, pad in zip(batch, pads, strict=True)]
        found["position_ids"] = torch.tensor([[at for size in sizes for at in range(size)] for sizes in lengths])
    else:
        masks = [[*[1] * len(row.input_ids), *[0] * pad] for row, pad in zip(batch, pads, strict=True)]
        found["attention_mask"] = torch.tensor(masks)
    return found


def attending(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What tells a model which tokens of a `collate`d batch see each other."""
    return {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}

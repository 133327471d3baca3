"""Records to token rows: windows of plain text, or a chat turn whose answer alone is scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_pipe.datasets import Record
from qlora_pipe.errors import DataError

IGNORED = -100
"""Label of a position that is not scored."""

_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Row:
    """One sequence: token ids, and the same as labels with IGNORED where nothing is scored."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def scored(self) -> int:
        """Positions whose prediction counts; the first token has none."""
        return sum(label != IGNORED for label in self.labels[1:])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, from this machine only."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def rows(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    length: int,
    count: int,
    name: str,
    at_least: int = 1,
) -> list[Row]:
    """At most `count` rows of at most `length` tokens; raises DataError if there are fewer than `at_least`.

    Plain text is joined and cut into windows without overlap, each beginning with the tokens the tokenizer itself puts
    first (Gemma's <bos>, nothing for most). A chat turn is one row; what exceeds `length` is cut off.
    """
    if records and records[0].prompt is None:
        text = "\n\n".join(record.text for record in records[: count * length])
        span = count * length * _CHARACTERS_PER_TOKEN
        found = _windows(tokenizer, text[:span], length)[:count]
        while len(found) < count and span < len(text):
            span *= 2
            found = _windows(tokenizer, text[:span], length)[:count]
    else:
        made = (_turn(tokenizer, record, length) for record in records)
        found = []
        for row in made:
            if row.scored:
                found.append(row)
            if len(found) == count:
                break
    if not found:
        raise DataError(f"{name}: too short, not one row of {length} tokens; give more text or another length")
    if len(found) < at_least:
        tokens = sum(len(row.input_ids) for row in found)
        raise DataError(
            f"{name}: too short, expected {at_least} rows of {length} tokens ({at_least * length} tokens), found "
            f"{len(found)} ({tokens} tokens); give more text, or ask for fewer or shorter sequences"
        )
    return found


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


def collate(batch: Sequence[Row]) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels, each [rows, longest]."""
    longest = max(len(row.input_ids) for row in batch)
    pads = [longest - len(row.input_ids) for row in batch]
    return {
        "input_ids": torch.tensor([[*row.input_ids, *[0] * pad] for row, pad in zip(batch, pads, strict=True)]),
        "attention_mask": torch.tensor(
            [[*[1] * len(row.input_ids), *[0] * pad] for row, pad in zip(batch, pads, strict=True)]
        ),
        "labels": torch.tensor([[*row.labels, *[IGNORED] * pad] for row, pad in zip(batch, pads, strict=True)]),
    }


def _windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[Row]:
    prefix = _first_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = length - len(prefix)
    if length < 2 or step < 1:
        return []  # a window must hold a token that is predicted
    cuts = (tuple(ids[start : start + step]) for start in range(0, len(ids) - step + 1, step))
    return [Row(prefix + cut, prefix + cut) for cut in cuts]


def _first_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text; what some put after it has no place in front."""
    bare, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return tuple(whole[: whole.index(bare[0])])


def _turn(tokenizer: PreTrainedTokenizerBase, record: Record, length: int) -> Row:
    """The user's turn and the answer, in the model's chat template if it has one; only the answer is scored."""
    assert record.prompt is not None
    if tokenizer.chat_template:
        user = [{"role": "user", "content": record.prompt}]
        both = [*user, {"role": "assistant", "content": record.text}]
        before = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(both, tokenize=False)
        after = whole[len(before) :] if whole.startswith(before) else record.text + (tokenizer.eos_token or "")
        prefix: tuple[int, ...] = ()
    else:
        before, after = f"{record.prompt}\n", record.text + (tokenizer.eos_token or "")
        prefix = _first_tokens(tokenizer)
    asked = [*prefix, *tokenizer(before, add_special_tokens=False).input_ids]
    answered = tokenizer(after, add_special_tokens=False).input_ids
    ids = (*asked, *answered)[:length]
    return Row(ids, ((IGNORED,) * len(asked) + tuple(answered))[:length])

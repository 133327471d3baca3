"""Rows of token ids: what is in them, and which of their labels are scored."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from qlora_pipe.datasets import Record
from qlora_pipe.errors import DataError
from qlora_pipe.hf.tokens import IGNORED, Row, collate, load_tokenizer, rows, take

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}~{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# A template that drops what was asked once it is answered: the prompt is no prefix of the whole.
FORGETFUL = "{% for message in messages[-1:] %}[{{ message.role }}]{{ message.content }}~{% endfor %}"


def with_begin(tokenizer: PreTrainedTokenizerBase, *, end: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer as Gemma's and Llama's are: it puts a token first by itself (and, as some, one last)."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    special = [("<s>", tokenizer.bos_token_id), ("<|end|>", tokenizer.eos_token_id)]
    single = "<s> $A <|end|>" if end else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids))


def scored_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    return text_of(tokenizer, tuple(label for label in row.labels if label != IGNORED))


def test_windows_cover_the_text_without_overlap() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(chr(97 + n % 26) for n in range(70))
    found = rows(tokenizer, [Record(None, text)], length=16, count=10, name="x")
    assert [len(row.input_ids) for row in found] == [16] * 4
    assert "".join(text_of(tokenizer, row.input_ids) for row in found) == text[:64]
    assert all(row.labels == row.input_ids and row.scored == 15 for row in found)


def test_a_text_that_fills_its_last_window_loses_nothing() -> None:
    assert len(rows(byte_tokenizer(), [Record(None, "x" * 64)], length=16, count=10, name="x")) == 4


def test_count_is_respected_and_records_are_joined() -> None:
    tokenizer = byte_tokenizer()
    records = [Record(None, "abcd"), Record(None, "efghijkl")]
    found = rows(tokenizer, records, length=7, count=1, name="x")
    assert [text_of(tokenizer, row.input_ids) for row in found] == ["abcd\n\ne"]


def test_every_window_begins_with_the_tokenizers_own_first_token() -> None:
    tokenizer = with_begin(byte_tokenizer())
    found = rows(tokenizer, [Record(None, "abcdefghijkl")], length=5, count=10, name="x")
    assert [text_of(tokenizer, row.input_ids) for row in found] == ["<s>abcd", "<s>efgh", "<s>ijkl"]
    assert {len(row.input_ids) for row in found} == {5}
    assert {row.scored for row in found} == {4}


def test_a_token_that_the_tokenizer_puts_last_does_not_come_first() -> None:
    tokenizer = with_begin(byte_tokenizer(), end=True)
    plain = rows(tokenizer, [Record(None, "abcdefgh")], length=5, count=10, name="x")
    assert [text_of(tokenizer, row.input_ids) for row in plain] == ["<s>abcd", "<s>efgh"]
    (turn,) = rows(tokenizer, [Record("why", "so")], length=40, count=1, name="x")
    assert text_of(tokenizer, turn.input_ids) == "<s>why\nso<|end|>"


def test_only_the_answer_of_a_templated_turn_is_scored() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (row,) = rows(tokenizer, [Record("why?", "because")], length=100, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "[user]why?~[assistant]because~"
    assert scored_text(tokenizer, row) == "because~"
    assert len(row.labels) == len(row.input_ids)
    assert row.scored == len("because~")


def test_a_template_whose_prompt_is_no_prefix_still_scores_the_answer_alone() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    (row,) = rows(tokenizer, [Record("why?", "because")], length=100, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "[user]why?~because<|end|>"
    assert scored_text(tokenizer, row) == "because<|end|>"


def test_without_a_template_the_turn_is_two_lines_and_the_end() -> None:
    tokenizer = with_begin(byte_tokenizer())
    (row,) = rows(tokenizer, [Record("why?", "because")], length=100, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "<s>why?\nbecause<|end|>"
    assert scored_text(tokenizer, row) == "because<|end|>"


def test_a_template_that_writes_the_first_token_gets_no_second() -> None:
    tokenizer = with_begin(byte_tokenizer())
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    (row,) = rows(tokenizer, [Record("a", "b")], length=100, count=5, name="x")
    assert Counter(row.input_ids)[tokenizer.bos_token_id] == 1
    assert row.input_ids[0] == tokenizer.bos_token_id


def test_long_turns_are_cut_and_turns_without_a_scored_token_are_dropped() -> None:
    tokenizer = byte_tokenizer()
    records = [Record("a", "bcdefgh"), Record("far too long a question", "x"), Record("i", "j")]
    found = rows(tokenizer, records, length=6, count=5, name="x")
    assert [text_of(tokenizer, row.input_ids) for row in found] == ["a\nbcde", "i\nj<|end|>"]
    assert [row.scored for row in found] == [4, 2]


@pytest.mark.parametrize(
    ("records", "length"),
    [
        ([], 8),
        ([Record(None, "short")], 8),
        ([Record(None, "long enough, were it not for the length")], 1),
        ([Record("a question that fills the row", "x")], 8),
    ],
)
@pytest.mark.parametrize("begins", [False, True])
def test_not_one_row_is_an_error_that_names_the_source(records: list[Record], length: int, begins: bool) -> None:
    tokenizer = with_begin(byte_tokenizer()) if begins else byte_tokenizer()
    with pytest.raises(DataError, match=f"wiki.txt: too short, not one row of {length} tokens"):
        rows(tokenizer, records, length=length, count=3, name="wiki.txt")


@pytest.mark.parametrize("records", [[Record(None, "x" * 47)], [Record("ask", "answer") for _ in range(2)]])
def test_fewer_rows_than_needed_is_an_error_that_counts_them(records: list[Record]) -> None:
    asked = {"length": 16, "count": 3, "name": "wiki.txt"}
    found = rows(byte_tokenizer(), records, **asked, at_least=2)
    tokens = sum(len(row.input_ids) for row in found)
    assert len(found) == 2
    message = rf"wiki.txt: too short, expected 3 rows of 16 tokens \(48 tokens\), found 2 \({tokens} tokens\)"
    with pytest.raises(DataError, match=message):
        rows(byte_tokenizer(), records, **asked, at_least=3)


def test_tokens_of_many_characters_do_not_make_a_text_short() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["a very long token indeed"])
    text = "a very long token indeed" * 30
    assert [len(row.input_ids) for row in rows(tokenizer, [Record(None, text)], length=10, count=3, name="x")] == [
        10
    ] * 3


def test_take_stops_at_the_tokens_but_takes_one_row() -> None:
    found = [Row((1, 2, 3), (1, 2, 3)), Row((1, 2), (1, 2)), Row((1, 2, 3), (1, 2, 3))]
    assert take(found, 3) == found[:2]
    assert take(found, 4) == found[:2]
    assert take(found, 5) == found
    assert take(found, 1) == found[:1]


def test_collate_pads_right_and_scores_no_pad() -> None:
    batch = collate([Row((5, 6, 7), (IGNORED, 6, 7)), Row((8,), (8,))])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_load_tokenizer_reads_the_folder(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    assert load_tokenizer(tmp_path)("ab").input_ids == byte_tokenizer()("ab").input_ids

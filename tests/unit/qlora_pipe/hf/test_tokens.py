"""Rows of token ids: what is in them, and which of their labels are scored."""

from collections import Counter
from pathlib import Path

import pytest
from tiny import byte_tokenizer, save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from qlora_pipe.errors import DataError
from qlora_pipe.hf.sequences import IGNORED, Row
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.records import Message, Record

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


def test_every_answer_of_a_chat_is_scored() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    earlier = (Message("system", "be brief"), Message("user", "why?"), Message("assistant", "because"))
    (row,) = rows(tokenizer, [Record("and?", "so", earlier)], length=200, count=5, name="x")
    whole = "[system]be brief~[user]why?~[assistant]because~[user]and?~[assistant]so~"
    assert text_of(tokenizer, row.input_ids) == whole
    assert scored_text(tokenizer, row) == "because~so~"
    tokenizer.chat_template = None
    (row,) = rows(tokenizer, [Record("and?", "so", earlier)], length=200, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "be brief\nwhy?\nbecause<|end|>and?\nso<|end|>"
    assert scored_text(tokenizer, row) == "because<|end|>so<|end|>"


def test_of_a_chat_whose_template_forgets_the_last_answer_is_scored() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    record = Record("and?", "so", (Message("user", "why?"), Message("assistant", "because")))
    (row,) = rows(tokenizer, [record], length=200, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "[user]and?~so<|end|>"
    assert scored_text(tokenizer, row) == "so<|end|>"


def test_a_chat_that_the_template_refuses_is_an_error_of_the_data() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TEMPLATE
    )
    record = Record("and?", "so", (Message("system", "be brief"),))
    with pytest.raises(DataError, match="template refuses a chat of system, user: no system turn; convert"):
        rows(tokenizer, [record], length=200, count=5, name="x")


def test_a_plain_form_is_for_models_without_a_template() -> None:
    tokenizer, record = byte_tokenizer(), Record("do it", "done", plain="### Instruction:\ndo it\n\n### Response:\n")
    (row,) = rows(tokenizer, [record], length=200, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "### Instruction:\ndo it\n\n### Response:\n\ndone<|end|>"
    tokenizer.chat_template = TEMPLATE
    (row,) = rows(tokenizer, [record], length=200, count=5, name="x")
    assert text_of(tokenizer, row.input_ids) == "[user]do it~[assistant]done~"


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_cut_or_left_out_are_counted(packing: bool) -> None:
    told: list[str] = []
    records = [Record("a", "bcdefgh"), Record("far too long a question", "x"), Record("i", "j")]
    rows(byte_tokenizer(), records, length=6, count=5, name="x.json", packing=packing, tell=told.append)
    assert told == ["x.json: 2 of 3 rows were cut at 6 tokens, and 1 of them left out, as no answer began before"]
    rows(byte_tokenizer(), records[::2], length=6, count=5, name="x.json", packing=packing, tell=told.append)
    assert told[1] == "x.json: 1 of 2 rows were cut at 6 tokens"


def test_packing_takes_as_many_records_as_fill_the_rows() -> None:
    records = [Record("a", "b" * (n % 5)) for n in range(1, 200)]
    found = rows(byte_tokenizer(), records, length=20, count=7, name="x", packing=True)
    assert len(found) == 7
    assert all(len(row.input_ids) <= 20 and len(row.lengths) > 1 for row in found)
    alone = rows(byte_tokenizer(), records, length=20, count=200, name="x")
    assert sum(len(row.lengths) for row in found) < len(alone)
    assert len(rows(byte_tokenizer(), records, length=20, count=200, name="x", packing=True)) < 200


def test_load_tokenizer_reads_the_folder(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    assert load_tokenizer(tmp_path)("ab").input_ids == byte_tokenizer()("ab").input_ids

"""Forms of instruction data, and records that are read when they are asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.config_data import Dataset
from qlora_pipe.errors import DataError
from qlora_pipe.records import JsonLines, Message, Record, read_records


def save(folder: Path, rows: list[Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, form: str, **changes: Any) -> list[Record]:
    return list(read_records(path, Dataset.model_validate({"source": str(path), "format": form} | changes)))


def test_alpaca_has_an_input_or_none(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "la"},
        {"instruction": "Hum.", "output": "mm"},
        {"instruction": "Nothing.", "output": " "},
        {"instruction": "Skip.", "output": "x"},
    ]
    assert read(save(tmp_path, rows), "alpaca", exclude=["Skip."]) == [
        Record("Add.\n\n1 2", "3", plain="### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"),
        Record("Sing.", "la", plain="### Instruction:\nSing.\n\n### Response:\n"),
        Record("Hum.", "mm", plain="### Instruction:\nHum.\n\n### Response:\n"),
    ]


def test_messages_end_with_the_last_answer(tmp_path: Path) -> None:
    chat = [("system", "be brief"), ("user", "why?"), ("assistant", "because"), ("user", "and?"), ("assistant", "so")]
    turns = [{"role": role, "content": text} for role, text in chat]
    rows = [{"messages": turns}, {"messages": [*turns[:3], {"role": "user", "content": "unanswered"}]}]
    earlier = (Message("system", "be brief"), Message("user", "why?"), Message("assistant", "because"))
    assert read(save(tmp_path, rows), "messages") == [
        Record("and?", "so", earlier),
        Record("why?", "because", (Message("system", "be brief"),)),
    ]


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("alpaca", {"instruction": "a"}, "record 0 has no field 'output'"),
        ("messages", {"text": "a"}, "record 0: expected a field messages"),
        ("messages", {"messages": []}, "record 0: expected a field messages"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "found none"),
        ("messages", {"messages": [{"role": "assistant", "content": "a"}]}, "a turn of the user before the last"),
        ("messages", {"messages": [{"role": "tool", "content": "a"}]}, r'found \{"role": "tool"'),
        ("messages", {"messages": [{"role": "user", "content": ["a"]}]}, "with a role .* and a text content"),
        ("messages", {"messages": ["a"]}, 'found "a"'),
        ("messages", 3, "expected records"),
    ],
)
def test_records_of_another_form_are_refused(tmp_path: Path, form: str, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(save(tmp_path, [row]), form)


@pytest.mark.parametrize("template", ["prompt", "text"])
def test_a_form_takes_no_templates(template: str) -> None:
    given = {"source": "x", "format": "alpaca", template: "{a}"} | ({"response": "{b}"} if template == "prompt" else {})
    with pytest.raises(ValueError, match="format: alpaca has its own fields"):
        Dataset.model_validate(given)


def test_a_chat_has_no_field_to_exclude_by() -> None:
    with pytest.raises(ValueError, match="format: messages has none"):
        Dataset(source="x", format="messages", exclude=("a",))


def test_a_form_is_no_text() -> None:
    assert Dataset(source="x").is_text
    assert not Dataset(source="x", format="messages").is_text


def test_lines_are_read_again_when_a_record_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, [{"instruction": f"i{n}", "output": f"o{n}"} for n in range(100)])
    found = read_records(path, Dataset(source=str(path), format="alpaca"))
    path.write_text(path.read_text().replace("o42", "O42"))
    assert found[42].text == "O42", "held in memory"
    assert [record.text for record in found[40:43]] == ["o40", "o41", "O42"]
    assert [record.text for record in found.pick([3, 99])] == ["o3", "o99"]
    assert found[-1].text == "o99"


def test_json_lines_skip_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\n{"a": "\xc3\xa9\xe2\x80\xa8"}\r\n  \n[1]\n2')
    found = JsonLines(path)
    assert list(found) == [{"a": "é\u2028"}, [1], 2] == found[:]
    assert (len(found), found[1], found[-1]) == (3, [1], 2)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instr\n')
    with pytest.raises(DataError, match=r"rows.jsonl: line 2: expected JSON or JSONL records"):
        read(path, "alpaca")

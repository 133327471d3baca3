import json
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe import datasets
from qlora_pipe.config_data import Dataset
from qlora_pipe.datasets import Part, fingerprint
from qlora_pipe.errors import DataError, SourceError
from qlora_pipe.records import Record

ROWS = [{"title": f"t{number}", "extract": f"about {number}", "n": number} for number in range(50)]


def load(dataset: Dataset, part: Part, seed: int) -> list[Record]:
    return list(datasets.load(dataset, part, seed))


def save(folder: Path, rows: Any, name: str = "rows.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def chat(path: Path, **changes: Any) -> Dataset:
    settings = {"source": str(path), "prompt": "What is {title}?", "response": "{extract}", "heldout": 0.2}
    return Dataset.model_validate(settings | changes)


def test_templates_fill_prompt_and_response(tmp_path: Path) -> None:
    records = load(chat(save(tmp_path, ROWS)), "train", 0)
    assert Record("What is t7?", "about 7") in records + load(chat(tmp_path / "rows.json"), "heldout", 0)


def test_a_template_of_plain_text(tmp_path: Path) -> None:
    data = Dataset(source=str(save(tmp_path, ROWS)), text="{{{n}}} {title}: {extract}", heldout=0.2)
    assert Record(None, "{7} t7: about 7") in load(data, "train", 0) + load(data, "heldout", 0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("heldout", "held"), [(0.1, 5), (0.2, 10), (0.5, 25)])
def test_parts_are_disjoint_and_whole(tmp_path: Path, seed: int, heldout: float, held: int) -> None:
    data = chat(save(tmp_path, ROWS), heldout=heldout)
    train, rest = load(data, "train", seed), load(data, "heldout", seed)
    assert (len(train), len(rest)) == (50 - held, held)
    assert sorted(record.text for record in train + rest) == sorted(row["extract"] for row in ROWS)


def test_the_order_is_seeded_and_stable(tmp_path: Path) -> None:
    data = chat(save(tmp_path, ROWS))
    assert load(data, "heldout", 0) == load(data, "heldout", 0) != load(data, "heldout", 1)
    # Written down, so that another machine or release cannot split differently unnoticed.
    assert [record.prompt for record in load(data, "heldout", 0)][:3] == [
        "What is t46?",
        "What is t15?",
        "What is t44?",
    ]


@pytest.mark.parametrize("form", ["list", "dict", "jsonl"])
def test_forms_of_a_file_are_the_same_records(tmp_path: Path, form: str) -> None:
    expected = load(chat(save(tmp_path, ROWS, "plain.json")), "train", 0)
    if form == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n")
    else:
        path = save(tmp_path, {row["title"]: row for row in ROWS} if form == "dict" else ROWS)
    assert load(chat(path), "train", 0) == expected


def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"title": "a", "extract": "one\u2028two\x85three"}, {"title": "b", "extract": "x"}]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8", newline="")
    found = load(chat(path, heldout=0.0), "train", 0)
    assert {record.text for record in found} == {row["extract"] for row in rows}


def test_exclude_drops_by_the_first_field(tmp_path: Path) -> None:
    path = save(tmp_path, ROWS)
    found = load(chat(path, exclude=["t3", "t4"], heldout=0.0), "train", 0)
    assert {row["title"] for row in ROWS} - {str(record.prompt)[8:-1] for record in found} == {"t3", "t4"}
    text = Dataset(source=str(path), text="{n}: {title}", exclude=("3",), heldout=0.0)
    assert {"3: t3"} == {f"{row['n']}: {row['title']}" for row in ROWS} - {r.text for r in load(text, "train", 0)}


@pytest.mark.parametrize("nothing", ["", "  \n", None])
def test_empty_answers_are_dropped(tmp_path: Path, nothing: str | None) -> None:
    path = save(tmp_path, [{"title": "a", "extract": nothing}, {"title": "b", "extract": "kept"}])
    assert load(chat(path, heldout=0.0), "train", 0) == [Record("What is b?", "kept")]


def test_a_plain_text_is_split_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij", encoding="utf-8")
    data = Dataset(source=str(tmp_path / "text.txt"), heldout=0.3)
    assert load(data, "train", 0) == load(data, "train", 9) == [Record(None, "abcdefg")]
    assert load(data, "heldout", 0) == [Record(None, "hij")]


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    first, second = (save(tmp_path, rows, name) for rows, name in ((ROWS, "a.json"), (ROWS, "b.json")))
    assert fingerprint(chat(first)) == fingerprint(chat(second))
    save(tmp_path, ROWS[1:], "b.json")
    assert fingerprint(chat(first)) != fingerprint(chat(second))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected JSON or JSONL records"),
        ("{", "expected JSON or JSONL records"),
        pytest.param("[" * 200_000, "expected JSON or JSONL records", id="deep"),
        ("[1, 2]", "expected records"),
        ('{"title": "a"}', "expected records"),
        ("3", "expected records"),
        ("[]", "found none that are not empty or excluded"),
        ('[{"title": "a", "extract": " "}]', "found none that are not empty"),
        ('[{"title": "a"}]', r"record 0 has no field 'extract' for template '\{extract\}'; it has title"),
        ('[{"title": "a", "extract": "b"}]', "the heldout part is empty"),
    ],
)
def test_files_that_are_no_records(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load(chat(tmp_path / "rows.json"), "heldout", 0)


@pytest.mark.parametrize(
    "template", ["{", "}", "{title", "{title!}", "{title!r}", "{title:>9}", "{}", "{title.x}", "{title[0]}"]
)
def test_templates_are_plain_names(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="template"):
        load(chat(save(tmp_path, ROWS), response=template), "train", 0)
    with pytest.raises(DataError, match="template"):
        load(chat(tmp_path / "rows.json", prompt=template), "train", 0)


def test_a_text_too_short_to_hold_out(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("ab")
    with pytest.raises(DataError, match="the heldout part of the text is empty"):
        load(Dataset(source=str(tmp_path / "text.txt")), "heldout", 0)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="expected UTF-8 text"):
        load(Dataset(source=str(tmp_path / "text.txt")), "train", 0)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone.txt, found nothing"):
        load(Dataset(source=str(tmp_path / "gone.txt")), "train", 0)

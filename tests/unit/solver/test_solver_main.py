"""The command line, in process."""

import json

import pytest

from solver.__main__ import main

CHOICES = [{"name": "4bit", "cost": 4, "loss": 1.0}, {"name": "2bit", "cost": 2, "loss": 8}]
INSTANCE = {"budget": 6, "items": [{"name": "q", "choices": CHOICES}, {"name": "k", "choices": CHOICES}]}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "instance.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
        return str(path)

    return write


def test_prints_the_answer_as_json(write, capsys):
    assert main([write(INSTANCE)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer.pop("seconds") >= 0
    selection = {"q": "4bit", "k": "2bit"}
    assert answer == {"selection": selection, "cost": 6, "loss": 9.0, "bound": 9.0, "gap": 0.0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            INSTANCE | {"budget": 3},
            "infeasible: the cheapest assignment costs 4, which is 1 over the budget of 3",
        ),
        (INSTANCE | {"ties": [["q", "x"]]}, "unknown item 'x'"),
        ("{", "Expecting property name"),
        (
            '{"budget": 1, "items": [{"name": "q", "choices": [{"name": "a", "cost": 1, "loss": NaN}]}]}',
            "'a' of item 'q'",
        ),
    ],
)
def test_says_why_and_exits_with_two(write, capsys, text, reason):
    assert main([write(text)]) == 2
    output = capsys.readouterr()
    assert reason in output.err
    assert not output.out


def test_a_missing_file_exits_with_two(tmp_path, capsys):
    assert main([str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err

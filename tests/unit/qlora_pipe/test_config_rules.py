from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_pipe.config import Config
from qlora_pipe.config_file import load, resolved_yaml
from qlora_pipe.config_rules import Rule
from qlora_pipe.errors import ConfigError

HEAD = "model: m\ndata: {calibration: a.txt, task: b.txt}\n"


def loaded(folder: Path, decompose: str) -> Config:
    path = folder / "my.yaml"
    path.write_text(f"{HEAD}decompose: {decompose}\n")
    return load(path)


def test_rules_and_ties_are_read_and_written(tmp_path: Path) -> None:
    config = loaded(tmp_path, "{rules: [{layers: [0, -1], roles: [down], min_bits: 4}], ties: [[q, k], 'a.*']}")
    assert config.decompose.rules == (Rule(layers=(0, -1), roles=("down",), min_bits=4),)
    assert config.decompose.ties == (("q", "k"), "a.*")
    (tmp_path / "again.yaml").write_text(resolved_yaml(config))
    assert load(tmp_path / "again.yaml").decompose == config.decompose


def test_a_rule_is_told_as_it_was_written() -> None:
    rule = Rule(layers=(0, -1), roles=("down",), min_bits=4, rank=0)
    assert str(rule) == "{layers: [0, -1], roles: [down], min_bits: 4, rank: 0}"


@pytest.mark.parametrize(
    ("decompose", "message"),
    [
        ("{rules: [{layers: [0]}]}", "my.yaml:3: decompose.rules.0: a rule needs at least one of min_bits"),
        ("{rules: [{rank: null}]}", "a rule needs at least one of min_bits"),
        ("{rules: [{layers: [], bits: 2}]}", "decompose.rules.0.layers: expected at least one"),
        ("{rules: [{roles: [], bits: 2}]}", "decompose.rules.0.roles: expected at least one"),
        (
            "{rules: [{bits: 2}, {min_bit: 2}]}",
            r"rules\.1\.min_bit; did you mean .*rules\.1\.min_bits",
        ),
        ("{rules: [{roles: [x], bits: 2}]}", "decompose.rules.0.roles.0: expected 'q'.* found 'x'"),
        ("{rules: [{bits: true}]}", "decompose.rules.0.bits: expected a whole number"),
        ("{ties: [[q, x]]}", "decompose.ties.0.roles.1: expected 'q'.* found 'x'"),
        ("{ties: [3]}", "decompose.ties.0.roles: expected a list, found 3"),
    ],
)
def test_refused(tmp_path: Path, decompose: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, decompose)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"min_bits": 3}, {"max_bits": 3}, {"bits": 2}, {"block_size": 32}])
def test_one_constraint_is_enough(settings: dict[str, Any]) -> None:
    assert Rule(**settings).model_dump(exclude_none=True) == settings
    with pytest.raises(ValidationError, match="frozen"):
        Rule(**settings).rank = 3  # type: ignore[misc]

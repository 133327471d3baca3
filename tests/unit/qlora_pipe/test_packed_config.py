"""quantization_config of packed and reshaped folders: every version, to the letter, and what none would be."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_pipe.errors import SourceError
from qlora_pipe.packed_config import Packing, from_json, to_json
from quant.storage import Choice

CHOICE = Choice("nf", 4, 16, 4)
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
WHOLE = {UP: Packing(CHOICE, False), DOWN: Packing(CHOICE, True)}
NARROW = {UP: Packing(CHOICE, False, (32, 64)), DOWN: Packing(CHOICE, True)}
FORMAT = {
    "grid": "nf",
    "bits": 4,
    "block_size": 16,
    "rank": 4,
    "scale_bits": 8,
    "scale_dtype": "bfloat16",
    "superblock": None,
    "factor_dtype": "bfloat16",
}
FIRST = {
    "quant_method": "qlora_pipe",
    "version": 1,
    "formats": [FORMAT | {"transposed": False}, FORMAT | {"transposed": True}],
    "modules": {UP: 0, DOWN: 1},
}
SECOND = FIRST | {"version": 2, "sides": {UP: [32, 64]}}
DENSE = {UP: Packing(sides=(32, 64)), DOWN: Packing(sides=(64, 32))}
THIRD = {
    "quant_method": "qlora_pipe",
    "version": 3,
    "formats": [],
    "modules": {},
    "sides": {UP: [32, 64], DOWN: [64, 32]},
}
MIXED = {UP: Packing(CHOICE, False, (32, 64)), DOWN: Packing(sides=(64, 32))}
BIASED = {UP: Packing(CHOICE, False), DOWN: Packing(CHOICE, True, bias=True), "other": Packing(bias=True)}
ADDED = FIRST | {"version": 3, "biases": [DOWN, "other"]}
BOTH = THIRD | {"formats": [FORMAT | {"transposed": False}], "modules": {UP: 0}}


@pytest.mark.parametrize(
    ("packings", "body"), [(WHOLE, FIRST), (NARROW, SECOND), (DENSE, THIRD), (MIXED, BOTH), (BIASED, ADDED)]
)
def test_every_version_is_written_and_read(packings: dict[str, Packing], body: dict[str, Any]) -> None:
    assert to_json(packings) == body
    assert from_json(json.loads(json.dumps(body))) == packings


def test_sides_make_no_formats() -> None:
    packings = {f"map{side}": Packing(CHOICE, False, (side, 64)) for side in (16, 32, 48)}
    assert len(to_json(packings)["formats"]) == 1
    assert from_json(to_json(packings)) == packings


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(version=4), "expected version 1, 2 or 3, found 4"),
        (lambda body: body.update(version=None), "expected version 1, 2 or 3, found None"),
        (lambda body: body.update(version=1), "sides .* in version 1, which belong to 2"),
        (lambda body: body.update(version=3), "sides .* in version 3, which belong to 2"),
        (lambda body: body.pop("sides"), "sides None .* in version 2, which belong to 1"),
        (lambda body: body.update(sides={}), "sides {} .* in version 2, which belong to 1"),
        (lambda body: body.update(biases=[UP]), "biases .* in version 2, which belong to 3"),
        (lambda body: body.update(biases=7), "TypeError"),
        (lambda body: body.update(sides=[1]), "AttributeError"),
        (lambda body: body["sides"].update({"model.norm": [1, 64]}), "in version 2, which belong to 3"),
        (lambda body: body["sides"].update({UP: [-32, 64]}), r"above 0, not \[-32, 64\]"),
        (lambda body: body["sides"].update({UP: [0, 64]}), "above 0"),
        (lambda body: body["sides"].update({UP: [32]}), r"must be \[out, in\]"),
        (lambda body: body["sides"].update({UP: [32, 64, 1]}), r"must be \[out, in\]"),
        (lambda body: body["sides"].update({UP: [32.0, 64]}), r"must be \[out, in\]"),
        (lambda body: body["sides"].update({UP: [True, 64]}), r"must be \[out, in\]"),
        (lambda body: body["sides"].update({UP: "32"}), r"must be \[out, in\]"),
        (lambda body: body["sides"].update({UP: None}), r"must be \[out, in\]"),
    ],
)
def test_what_would_not_be_written_is_refused(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    body = json.loads(json.dumps(SECOND))
    change(body)
    with pytest.raises(SourceError, match=says):
        from_json(body)

import itertools
import json
import math

import pytest
import torch

from quant.exceptions import QuantError, ShapeError
from quant.storage import FACTOR_DTYPES, GRIDS, Choice, PackedShape

EVERY = [
    Choice(grid, bits, block, rank, scale_bits, dtype, superblock, factor)
    for grid, bits, block, rank, (scale_bits, dtype, superblock), factor in itertools.product(
        GRIDS,
        (2, 3, 8),
        (16, 64),
        (0, 4),
        (
            (8, "bfloat16", None),
            (3, "float32", 4),
            (16, "float16", None),
            (16, "bfloat16", None),
            (32, "float32", None),
        ),
        FACTOR_DTYPES,
    )
]


def test_names_are_unique_and_leave_defaults_out():
    assert len({choice.name for choice in EVERY}) == len(EVERY)
    assert Choice("nf", 3, 64, 0).name == "nf3-b64-r0"
    assert Choice("int", 4, 128, 16, 16, "float16").name == "int4-b128-r16-s16-float16"
    assert Choice("lloyd", 2, 64, 8, 4, superblock=256, factor_dtype="int8").name == "lloyd2-b64-r8-s4-S256-Lint8"


def test_rows_of_a_table_round_trip():
    for choice in EVERY:
        row = json.loads(json.dumps(choice.to_json() | {"bytes": 7, "loss": 0.5}))
        assert Choice.from_json(row) == choice
    with pytest.raises(QuantError, match="none of grid, rank in"):
        Choice.from_json({key: value for key, value in row.items() if key not in ("grid", "rank")})


def test_choices_are_hashable_and_frozen():
    assert len(set(EVERY) | {Choice.from_json(choice.to_json()) for choice in EVERY}) == len(EVERY)
    with pytest.raises(AttributeError):
        EVERY[0].bits = 3


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"grid": "fp"}, "grid must"),
        ({"bits": 5}, "bits must"),
        ({"block_size": 0}, "block_size"),
        ({"rank": -1}, "rank"),
        ({"scale_bits": 1}, "scale_bits"),
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"scale_bits": 16, "scale_dtype": "float32"}, "with scale_bits 16, got 'float32'"),
        ({"scale_bits": 32}, "with scale_bits 32, got 'bfloat16'"),
        ({"superblock": 0}, "positive or None"),
        ({"superblock": 4, "scale_bits": 16}, "superblock must be None where"),
        ({"factor_dtype": "int4"}, "factor_dtype"),
    ],
)
def test_bad_choices_are_refused(fields, complaint):
    with pytest.raises(QuantError, match=complaint):
        Choice(**({"grid": "nf", "bits": 4, "block_size": 64, "rank": 0} | fields))


def test_buffers_of_a_map_by_hand():
    found = PackedShape(128, 48, Choice("nf", 3, 64, 5), transposed=False, bias=True).buffers()
    assert found == {
        "codes": ("int32", (48, 12)),
        "levels": ("float32", (8,)),
        "scale_codes": ("uint8", (48, 2)),
        "scale_max": ("bfloat16", (48,)),
        "scale_offset": ("float32", (1,)),
        "lowrank_left": ("bfloat16", (48, 5)),
        "lowrank_right": ("bfloat16", (5, 128)),
        "bias": ("float32", (48,)),
    }
    choice = Choice("uint", 4, 16, 5, 16, "float16", factor_dtype="int8")
    assert PackedShape(128, 48, choice, transposed=True).buffers() == {
        "codes": ("int32", (128, 6)),
        "levels": ("float32", (16,)),
        "zero_codes": ("int32", (128, 1)),
        "scale": ("float16", (128, 3)),
        "lowrank_left": ("int8", (48, 5)),
        "lowrank_right": ("int8", (5, 128)),
        "lowrank_scale": ("float32", (5,)),
    }
    spanning = PackedShape(128, 48, Choice("nf", 2, 16, 0, 3, superblock=32), transposed=False).buffers()
    assert spanning["scale_codes"] == ("int32", (48, 3))
    assert spanning["scale_max"] == ("bfloat16", (12,))


def test_bytes_without_padding_are_the_published_formula():
    for bits, scale_bits, dtype, block, superblock in ((2, 2, "bfloat16", 64, 256), (3, 4, "float32", 16, 64)):
        shape = PackedShape(16384, 16, Choice("nf", bits, block, 0, scale_bits, dtype, superblock), transposed=False)
        stored = sum(getattr(torch, kind).itemsize * math.prod(size) for kind, size in shape.buffers().values())
        published = bits + scale_bits / block + getattr(torch, dtype).itemsize * 8 / (block * superblock)
        assert 8 * stored == 16 * 16384 * published + 32 + 32 * 2**bits


@pytest.mark.parametrize("choice", [Choice("nf", 4, 48, 0), Choice("int", 4, 48, 0, 16, "float16")])
def test_ragged_blocks_are_refused(choice):
    with pytest.raises(ShapeError, match="64 columns do not split into blocks of 48"):
        PackedShape(64, 96, choice, transposed=False).buffers()


def test_ragged_superblocks_are_refused():
    with pytest.raises(ShapeError, match="384 blocks do not split into superblocks of 5"):
        PackedShape(64, 96, Choice("nf", 4, 16, 0, superblock=5), transposed=False).buffers()


def test_only_superblocks_across_rows_change_when_rows_go():
    assert Choice("nf", 4, 16, 3).sliced() == Choice("nf", 4, 16, 3)
    assert Choice("uint", 4, 16, 3, 16).sliced() == Choice("uint", 4, 16, 3, 16)
    assert Choice("nf", 4, 16, 3, 4, "float16", 8).sliced() == Choice("nf", 4, 16, 3, 32, "float32")

"""Between a quantised matrix and the buffers of `quant.storage.PackedShape`: both directions, for every choice."""

from collections.abc import Mapping

from torch import Tensor

from quant.blockwise import BlockQuantized
from quant.pack import pack, unpack
from quant.scales import StoredScales, scales
from quant.storage import PackedShape

Factors = tuple[Tensor, Tensor, Tensor | None]
"""What `quant.lowrank.store_factors` returns."""

_BY_STORED_ROW = ("codes", "zero_codes", "scale", "scale_codes", "scale_max")
"""Buffers of which a row belongs to a row of the stored matrix, when there is one superblock a row."""


def packed_buffers(
    quantized: BlockQuantized, factors: Factors, shape: PackedShape, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """Every stored tensor of one packed linear map, from Q in the stored orientation and
    factors left [out, rank], right [rank, in].

    `bias`: [out] or None. Raises QuantError or ShapeError as `pack`.
    """
    choice, stored = shape.choice, quantized.scales
    left, right, factor_scale = factors
    found: dict[str, Tensor | None] = {
        "codes": pack(quantized.codes, choice.bits),
        "levels": quantized.levels,
        "zero_codes": None if quantized.zero is None else pack(quantized.zero, choice.bits),
        "scale" if choice.direct else "scale_codes": stored.values,
        "scale_max": stored.maximum,
        "scale_offset": stored.offset,
        "lowrank_left": left,
        "lowrank_right": right,
        "lowrank_scale": factor_scale,
        "bias": bias,
    }
    if choice.scale_bits < 8:
        found["scale_codes"] = pack(stored.values, choice.scale_bits)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def first_level_scales(buffers: Mapping[str, Tensor], shape: PackedShape) -> Tensor:
    """Scales fp32 [rows, blocks] of the stored matrix."""
    choice = shape.choice
    if choice.direct:
        return buffers["scale"].float()
    codes = buffers["scale_codes"]
    if choice.scale_bits < 8:
        codes = unpack(codes, choice.scale_bits, choice.blocks_per_row(shape.columns))
    return scales(StoredScales(codes, buffers["scale_max"], buffers["scale_offset"]), choice)


def zero_points(buffers: Mapping[str, Tensor], shape: PackedShape) -> Tensor | None:
    """uint8 [rows, blocks] on the grid "uint", else None."""
    choice = shape.choice
    if choice.grid != "uint":
        return None
    return unpack(buffers["zero_codes"], choice.bits, choice.blocks_per_row(shape.columns))


def slice_rows(buffers: Mapping[str, Tensor], shape: PackedShape, rows: Tensor) -> dict[str, Tensor]:
    """The buffers of the map that keeps `rows` (int64 indices) of the stored matrix, with the choice
    ``shape.choice.sliced()``; its weights are exactly those rows.

    Superblocks that span rows cannot be cut: their scales are written out in fp32.
    """
    found = dict(buffers)
    if shape.choice.superblock is not None:
        scale = first_level_scales(buffers, shape)
        found = {name: tensor for name, tensor in found.items() if not name.startswith("scale_")} | {"scale": scale}
    by_row = _BY_STORED_ROW if shape.transposed else (*_BY_STORED_ROW, "lowrank_left", "bias")
    for name in found.keys() & set(by_row):
        found[name] = found[name].index_select(0, rows)
    if shape.transposed:
        found["lowrank_right"] = found["lowrank_right"][:, rows]
    return found

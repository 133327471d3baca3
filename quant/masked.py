"""A packed linear map with exact zeros in Q: scales, levels and the low-rank part stay, codes are found again."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.blockwise import zero_codes
from quant.buffers import first_level_scales, zero_points
from quant.lowrank import dequantize_factors
from quant.pack import pack, unpack
from quant.rounding import Feedback, round_masked
from quant.storage import PackedShape


def residual(weight: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
    """What Q of a packed map is to stand for: fp32 `weight` [out, in] less the low-rank part. Peak: the result."""
    factors = buffers["lowrank_left"], buffers["lowrank_right"], buffers.get("lowrank_scale")
    product = torch.matmul(*dequantize_factors(*factors))
    return torch.sub(weight, product, out=product)


def masked_buffers(
    weight: Tensor, mask: Tensor, buffers: Mapping[str, Tensor], shape: PackedShape, passing: Feedback
) -> dict[str, Tensor]:
    """The buffers of Q + L1 L2 whose Q is exactly zero where `mask`, bool [out, in], is True.

    All others are found again, on `weight` fp32 [out, in] less the low-rank part, later columns making up for zeros and
    rounding. Every buffer but the codes is the same. Codes stay dense: neither bytes nor memory shrink. Raises as
    `round_masked`. Peak: four fp32 copies of `weight` beside it.
    """
    codes = round_masked(
        residual(weight, buffers),
        passing,
        mask,
        first_level_scales(buffers, shape),
        buffers["levels"],
        zero_points(buffers, shape),
        transposed=shape.transposed,
    )
    return dict(buffers) | {"codes": pack(codes, shape.choice.bits)}


def zero_entries(buffers: Mapping[str, Tensor], shape: PackedShape) -> Tensor:
    """Where the code of Q stands for an exact zero: bool [out, in]. Raises QuantError where none does."""
    codes = unpack(buffers["codes"], shape.choice.bits, shape.columns).view(shape.rows, -1, shape.choice.block_size)
    found = codes == zero_codes(buffers["levels"], zero_points(buffers, shape)).unsqueeze(-1)
    stored = found.view(shape.rows, shape.columns)
    return stored.T if shape.transposed else stored

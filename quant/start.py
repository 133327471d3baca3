"""Where L4Q starts: first integers of a matrix, nearest or error-compensated, and a frozen weight that rounds to them.

Codes that make up for each other's errors differ from the nearest ones by a matrix of full rank, so no low-rank product
added to the weight leads to them: the best of rank 4 misses a tenth of the codes of a model as small as stories260K.
But a weight can be moved to where its code is the nearest, by as little as it takes: to the edge of the cell of weights
that round to that code. Weights whose codes were the nearest anyway stay where they are. At the centres of cells, where
codes alone would store them, is as exact a start, but nothing leaves it before it has moved half a step.
"""

from typing import Literal

import torch
from torch import Tensor

from quant import grid
from quant.exceptions import QuantError, ShapeError
from quant.fakequant import MIN_TRAINED_STEP
from quant.linear import PackedMatrix
from quant.pack import pack
from quant.rounding import Feedback, quantize_compensated
from quant.scales import scales
from quant.storage import Choice, PackedShape

FirstCodes = grid.StepMethod | Literal["feedback"]

_MULTIPLES = tuple(1.0 - 0.1 * k for k in range(8))
"""Of a group's largest weight, tried as half the range of its levels."""

_EDGE = 0.499
"""Steps from the middle of a cell to where its outermost weights are put: codes stay theirs when fp32 rounds."""


@torch.no_grad()
def first_codes(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    method: FirstCodes,
    offset: grid.OffsetKind,
    importance: Tensor | None = None,
    passing: Feedback | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [out, in] of fp32 `weight` [out, in], steps fp32 [out, in // group_size], and offsets of that shape
    where these are trained, else None.

    "feedback": error-compensated rounding under the covariance behind `passing`, whose blocks are the groups; other
    methods and `importance`: the nearest codes on `grid.init_grid`. No step is below ``MIN_TRAINED_STEP``; groups whose
    step is raised to it take the nearest codes. Peak bytes: as `quantize_compensated` or `grid.init_grid`. Raises as
    these, and QuantError for feedback with a trained offset or without `passing`.
    """
    if method != "feedback":
        scale, trained = grid.init_grid(weight, bits, group_size, method=method, offset=offset, importance=importance)
        scale.clamp_(min=MIN_TRAINED_STEP)
        return grid.quantize(weight, scale, grid.offset_of(offset, scale, trained), bits)[0], scale, trained
    if offset == "trained" or passing is None:
        raise QuantError("feedback needs passing, how errors are passed on, and an offset that is zero or half a step")
    half = 1 << (bits - 1)
    choice = Choice("nf", bits, group_size, 0, 32, "float32")
    levels = (torch.arange(-half, half) + (0.5 if offset == "half" else 0.0)) / half
    found = quantize_compensated(weight, choice, passing, levels=levels, multiples=_MULTIPLES)
    step = scales(found.scales, choice) / half
    scale = step.clamp(min=MIN_TRAINED_STEP)
    nearest = grid.quantize(weight, scale, grid.offset_of(offset, scale), bits)[0]
    raised = (scale > step).repeat_interleave(group_size, dim=1)
    return torch.where(raised, nearest, grid.to_signed(found.codes, bits)), scale, None


@torch.no_grad()
def into_cells(weight: Tensor, codes: Tensor, scale: Tensor, *, bits: int, half: bool, dtype: torch.dtype) -> Tensor:
    """The matrix nearest to fp32 `weight` [out, in] that rounds to `codes` int8, also once it is held in `dtype`, where
    the last place of the largest weights is small beside a step: fp32 [out, in].

    `scale` [out, groups]; `half`: code 0 stands for half a step. Peak bytes: 3 x weight.
    """
    edge = max(0.0, _EDGE - torch.finfo(dtype).eps / 2 * (1 << (bits - 1)))
    return grid.dequantize(codes + _places(weight, codes, scale, half).clamp_(-edge, edge), scale, _tied(scale, half))


@torch.no_grad()
def packed_into_cells(
    weight: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    bits: int,
    half: bool,
    packed_bits: int = 8,
    factors: tuple[Tensor, Tensor] | None = None,
) -> PackedMatrix:
    """The same in `packed_bits` a weight: what the `bits` of `codes` leave of these says where in its cell a weight is,
    on places evenly spaced from edge to edge.

    factors: fp32 left [out, rank] and right [rank, in], whose product is then part of what is stored, so that what is
    rebuilt minus it lies in the cells. Peak bytes: 4 x weight and the result. Raises QuantError for more bits than are
    packed, ShapeError for factors that do not fit.
    """
    if bits > packed_bits:
        raise QuantError(f"codes of {bits} bits do not fit a weight packed in {packed_bits}")
    (rows, columns), places = codes.shape, 1 << (packed_bits - bits)
    left, right = factors or (weight.new_zeros(rows, 0), weight.new_zeros(0, columns))
    if left.shape != (rows, right.shape[0]) or right.shape[1] != columns:
        raise ShapeError(f"factors {list(left.shape)} and {list(right.shape)} do not fit a weight {[rows, columns]}")
    choice = Choice("nf", packed_bits, columns // scale.shape[1], right.shape[0], 32, "float32", factor_dtype="float32")
    within = torch.linspace(-_EDGE, _EDGE, places) if places > 1 else torch.zeros(1)
    low, high = grid.bounds(bits)
    levels = (torch.arange(low, high + 1)[:, None] + within + (0.5 if half else 0.0)).flatten()
    place = (_places(weight, codes, scale, half) / (2 * _EDGE) + 0.5).mul_(places - 1).round_().clamp_(0, places - 1)
    module = PackedMatrix(PackedShape(columns, rows, choice, transposed=False), device=weight.device)
    module.load_state_dict(
        {
            "codes": pack(
                ((codes.to(torch.int16) - low) * places + place.to(torch.int16)).to(torch.uint8), packed_bits
            ),
            "levels": levels,
            "scale": scale,
            "lowrank_left": left,
            "lowrank_right": right,
        }
    )
    return module


def _places(weight: Tensor, codes: Tensor, scale: Tensor, half: bool) -> Tensor:
    """How far each weight is from the middle of its code's cell, in steps: fp32 [out, in]."""
    return grid.normalise(weight, scale, _tied(scale, half)).view_as(codes) - codes


def _tied(scale: Tensor, half: bool) -> Tensor | None:
    return grid.half_step(scale) if half else None

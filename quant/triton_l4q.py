"""`quant.l4q_rows` as one kernel each, for CUDA: a weight's rows are read once and nothing of their size is in between.

A program has a tile of rows of one group: it merges, rounds, and reduces over the group in registers. All kernels spell
the merge and the rounding with one function over tiles of one size, and none may fuse a product with a sum, so that the
codes which are exported are those that were trained. Sums differ from plain torch's in their order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quant import grid

_TILE = 2048
"""Weights of a program, about; a group has at least 16, the least side of a tile in a product."""
_FACTORS = 8192
"""Numbers of A in a program, at most."""
_ROUNDS = tl.constexpr(12582912.0)
"""1.5 x 2**23: adding it to a small fp32 number and taking it off again rounds half to even."""


def fits(frozen: Tensor, lora_a: Tensor, scale: Tensor) -> bool:
    """Whether the kernels take these operands: fp32 steps, groups of a power of two from 16 weights on, a dense weight
    in fp32, fp16 or bf16, and factors of which a group's part fits a small GPU's shared memory: `_rebuild_kernel` has
    36,864 bytes at rank 64 and groups of 128 weights, compiled for sm_90."""
    group = frozen.shape[1] // scale.shape[1]
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    return (
        scale.dtype == torch.float32
        and frozen.dtype in kinds
        and group >= 16
        and group & (group - 1) == 0
        and len(lora_a) >= 1
        and _side(len(lora_a)) * group <= _FACTORS
    )


@triton.jit
def _quantised(
    frozen, lora_a, lora_b, scale, offset, row, column, group, rows, columns, groups, rank, alpha,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_OFFSET: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Unrounded codes and codes of a tile, and the steps and offsets of its rows."""
    here = row < rows
    k = tl.arange(0, RANK)
    tile = tl.load(frozen + row[:, None] * columns + column[None, :], mask=here[:, None], other=0.0).to(tl.float32)
    a = tl.load(lora_a + k[:, None] * columns + column[None, :], mask=(k < rank)[:, None], other=0.0)
    b = tl.load(lora_b + row[:, None] * rank + k[None, :], mask=here[:, None] & (k < rank)[None, :], other=0.0)
    merged = tile + alpha * tl.dot(b, a, input_precision="ieee")
    step = tl.load(scale + row * groups + group, mask=here, other=1.0)
    if HAS_OFFSET:
        at = tl.load(offset + row * groups + group, mask=here, other=0.0)
        real = tl.div_rn(merged - at[:, None], tl.broadcast_to(step[:, None], merged.shape))
    else:
        at = step * 0.0
        real = tl.div_rn(merged, tl.broadcast_to(step[:, None], merged.shape))
    nan: tl.constexpr = tl.PropagateNan.ALL
    clamped = tl.minimum(tl.maximum(real, LOW, propagate_nan=nan), HIGH, propagate_nan=nan)
    return real, (clamped + _ROUNDS) - _ROUNDS, step, at


@triton.jit
def _rebuild_kernel(
    out, frozen, lora_a, lora_b, scale, offset, rows, columns, groups, rank, alpha,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_OFFSET: tl.constexpr, CODES: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), group * GROUP + tl.arange(0, GROUP)
    _, found, step, at = _quantised(
        frozen, lora_a, lora_b, scale, offset, row, column, group, rows, columns, groups, rank, alpha,
        LOW, HIGH, HAS_OFFSET, RANK,
    )  # fmt: skip
    if not CODES:
        found = found * step[:, None]
        if HAS_OFFSET:
            found += at[:, None]
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, found.to(out.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def _pull_back_kernel(
    grad, w_q, grad_scale, grad_offset, frozen, lora_a, lora_b, scale, offset, rows, columns, groups, rank, alpha,
    LOW: tl.constexpr, HIGH: tl.constexpr, SLACK: tl.constexpr, HAS_OFFSET: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), group * GROUP + tl.arange(0, GROUP)
    real, found, step, at = _quantised(
        frozen, lora_a, lora_b, scale, offset, row, column, group, rows, columns, groups, rank, alpha,
        LOW, HIGH, HAS_OFFSET, RANK,
    )  # fmt: skip
    here, place = (row < rows)[:, None], row[:, None] * columns + column[None, :]
    if WEIGHT:
        value = found * step[:, None]
        if HAS_OFFSET:
            value += at[:, None]
        tl.store(w_q + place, value.to(w_q.dtype.element_ty), mask=here)
    # A NaN counts as inside, so that it reaches the gradients.
    outside = (real <= LOW - SLACK) | (real >= HIGH + SLACK)
    slope = tl.load(grad + place, mask=here, other=0.0)
    due = tl.sum(slope * (found - tl.where(outside, 0.0, real)), axis=1)
    tl.store(grad_scale + row * groups + group, due, mask=row < rows)
    if HAS_OFFSET:
        clipped = tl.sum(tl.where(outside, slope, 0.0), axis=1)
        tl.store(grad_offset + row * groups + group, clipped, mask=row < rows)
    tl.store(grad + place, tl.where(outside, 0.0, slope), mask=here)


def codes(
    frozen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor, offset: Tensor | None, alpha: float, bits: int
) -> Tensor:
    """As `quant.l4q_rows.codes`. Peak bytes: the result."""
    return _written(torch.int8, frozen, lora_a, lora_b, scale, offset, alpha, bits)


def rebuild(
    frozen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor, offset: Tensor | None, alpha: float, bits: int
) -> Tensor:
    """As `quant.l4q_rows.rebuild`. Peak bytes: the result."""
    return _written(scale.dtype, frozen, lora_a, lora_b, scale, offset, alpha, bits)


def pull_back(
    grad: Tensor,
    frozen: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    alpha: float,
    bits: int,
    *,
    weight: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """As `quant.l4q_rows.pull_back`, the gradient of the sum in `grad`'s place. Peak bytes: W_q."""
    # As the kernels write: row by row, whatever the operands' strides.
    w_q = torch.empty(frozen.shape, dtype=scale.dtype, device=frozen.device) if weight else None
    grad_scale = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
    grad_offset = None if offset is None else torch.empty_like(grad_scale)
    low, high = grid.bounds(bits)
    launch, operands, sides = _prepared(frozen, lora_a, lora_b, scale, offset)
    _pull_back_kernel[launch](
        *(grad, grad if w_q is None else w_q, grad_scale, grad_scale if grad_offset is None else grad_offset),
        *(*operands, alpha),
        LOW=low,
        HIGH=high,
        SLACK=grid.TIE_TOLERANCE,
        HAS_OFFSET=offset is not None,
        WEIGHT=weight,
        **sides,
    )
    return w_q, grad, grad_scale, grad_offset


def _written(
    dtype: torch.dtype,
    frozen: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    alpha: float,
    bits: int,
) -> Tensor:
    out = torch.empty(frozen.shape, dtype=dtype, device=frozen.device)
    low, high = grid.bounds(bits)
    launch, operands, sides = _prepared(frozen, lora_a, lora_b, scale, offset)
    has = offset is not None
    _rebuild_kernel[launch](
        *(out, *operands, alpha), LOW=low, HIGH=high, HAS_OFFSET=has, CODES=dtype == torch.int8, **sides
    )
    return out


def _prepared(
    frozen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor, offset: Tensor | None
) -> tuple[tuple[int, int], tuple[Tensor | int, ...], dict[str, int | bool]]:
    """Number of programs, operands, and the sides of a tile."""
    (rows, columns), groups, rank = frozen.shape, scale.shape[1], len(lora_a)
    group = columns // groups
    tile = max(16, _TILE // group)
    tensors = [part.contiguous() for part in (frozen, lora_a, lora_b, scale, scale if offset is None else offset)]
    sides = {"ROWS": tile, "GROUP": group, "RANK": _side(rank), "enable_fp_fusion": False}
    return (triton.cdiv(rows, tile), groups), (*tensors, rows, columns, groups, rank), sides


def _side(rank: int) -> int:
    """Of a tile of factors."""
    return max(16, 1 << (rank - 1).bit_length())

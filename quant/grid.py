"""The one definition of a group-wise integer grid: step, round, clamp, dequantise.

Training (``quant.fakequant``) and export read the same functions, so the integers a layer trains with are the
integers that are shipped. A group is ``group_size`` consecutive weights of one output row; code ``q`` of a
group with step ``scale`` and real offset ``offset`` stands for the weight ``q * scale + offset``.

Source: L4Q, arXiv 2402.04902 (ACL 2025), section 3 and the initialisation table.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError

MIN_STEP = 1e-8
"""Floor of an initial step; an all-zero group would otherwise divide by zero."""

TIE_TOLERANCE = 1e-4
"""Slack of the in-range test, in units of one step.

``max(W) / (max(W) / QP)`` rounds to a value just above QP in some groups (up to 8e-6 at 8 bits in fp32).
Without the slack those extremes would count as clipped at step 0.
"""

StepMethod = Literal["l4q", "symmetric", "lsq+", "asymmetric", "mse", "awmse"]

OffsetKind = Literal["zero", "half", "trained"]
"""What code 0 stands for: the weight 0, half a step, or a trained number.

At half a step the levels lie evenly on both sides of 0, which is not one of them: at 2 bits -1.5, -0.5, 0.5 and 1.5
steps (the balanced grid of ParetoQ, arXiv 2502.02631) where an offset of 0 has -2, -1, 0 and 1.
"""

_SHRINK_FACTORS = tuple(1.0 - 0.025 * k for k in range(29))


def bounds(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code, ``(QN, QP) = (-2**(bits-1), 2**(bits-1) - 1)``.

    Raises:
        QuantError: ``bits`` is outside 2..8.
    """
    if not 2 <= bits <= 8:
        raise QuantError(f"a grid has 2 to 8 bits, found bits={bits}")
    half = 1 << (bits - 1)
    return -half, half - 1


def group_count(columns: int, group_size: int) -> int:
    """Number of groups in one row of ``columns`` weights.

    Raises:
        ShapeError: ``group_size`` is not positive or does not divide ``columns``.
    """
    if group_size < 1 or columns % group_size:
        raise ShapeError(f"group_size must divide the input size: found group_size={group_size}, in={columns}")
    return columns // group_size


def init_grid(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    method: StepMethod = "l4q",
    offset: OffsetKind = "zero",
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Initial step of every group, and its offset where that is trained.

    ``"l4q"`` covers the whole range, ``max(|min W / QN|, |max W / QP|)``, or from half a step ``max |W| / (QP + 1/2)``,
    so nothing clips. ``"symmetric"`` is ``max |W| / 2**(bits-1)``, ``"lsq+"`` ``max |mean -+ 3 deviations| /
    2**(bits-1)``. ``"asymmetric"`` is ``(max W - min W) / (QP - QN)``, its offset puts max W at QP. ``"mse"`` shrinks
    the l4q step, or with a trained offset the asymmetric one about its middle, by the factor in 0.3..1.0 with the
    smallest squared error; ``"awmse"`` weights the error of each column by ``importance``. With the other methods a
    trained offset starts at 0. At 2 bits with an offset of 0 the l4q step rounds nearly everything to 0 (L4Q reports no
    2-bit result).

    Args:
        weight: [out, in], float; half precision is computed in fp32, fp64 stays fp64.
        importance: [in], mean square of each input, not negative; for ``"awmse"`` alone.

    Returns:
        scale, [out, in // group_size], fp32 (fp64 for fp64 weights), at least ``MIN_STEP``; a trained offset of the
        same shape, else None.

    Raises:
        QuantError: unknown method or bits; "asymmetric" without a trained offset; "awmse" without importance.
        ShapeError: ``in % group_size != 0``, not a matrix, or importance of another length. NonFiniteError: the weight
        holds inf or NaN.

    Peak bytes beyond weight and result: 2 x weight; "mse" and "awmse" 4 x weight (fp32).

    Source: L4Q, arXiv 2402.04902, the initialisation table; LSQ+, arXiv 2004.09576, section 3.2.
    """
    low, high = bounds(bits)
    if weight.dim() != 2:
        raise ShapeError(f"weight must be [out, in], found shape {tuple(weight.shape)}")
    groups = group_count(weight.shape[1], group_size)
    _check_method(method, offset, importance, weight.shape[1])
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    grouped = weight.reshape(weight.shape[0], groups, group_size)
    smallest, largest = grouped.aminmax(dim=-1)
    if not bool((torch.isfinite(smallest) & torch.isfinite(largest)).all()):
        raise NonFiniteError("weight holds inf or NaN; a step can only be chosen for finite weights")
    middle = None
    if method == "symmetric":
        step = torch.maximum(-smallest, largest) / -low
    elif method == "lsq+":
        deviation, mean = torch.std_mean(grouped, dim=-1, correction=0)
        step = (mean.abs() + 3 * deviation) / -low
    elif offset == "trained" and method != "l4q":
        step, middle = (largest - smallest) / (high - low), (largest + smallest) / 2
    elif offset == "half":
        step = torch.maximum(-smallest, largest) / (high + 0.5)
    else:
        step = torch.maximum((smallest / low).abs(), (largest / high).abs())
    step.clamp_(min=MIN_STEP)
    if method in ("mse", "awmse"):
        step = _search_step(weight, step, middle, bits, offset, importance if method == "awmse" else None)
    if offset != "trained":
        return step, None
    return step, torch.zeros_like(step) if middle is None else middle + half_step(step)


def half_step(scale: Tensor) -> Tensor:
    """The offset tied to the step, exact: with it, codes QN and QP lie equally far from 0."""
    return 0.5 * scale


def offset_of(kind: OffsetKind, scale: Tensor, trained: Tensor | None = None) -> Tensor | None:
    """The offset of every group at these steps: None where it is 0, half a step, or what was ``trained``."""
    return trained if kind == "trained" else half_step(scale) if kind == "half" else None


def _check_method(method: StepMethod, offset: OffsetKind, importance: Tensor | None, columns: int) -> None:
    if method not in get_args(StepMethod):
        raise QuantError(f"method must be one of {get_args(StepMethod)}, found {method!r}")
    if offset not in get_args(OffsetKind):
        raise QuantError(f"offset must be one of {get_args(OffsetKind)}, found {offset!r}")
    if method == "asymmetric" and offset != "trained":
        raise QuantError(f'method "asymmetric" starts a trained offset, found offset {offset!r}')
    if method == "awmse" and importance is None:
        raise QuantError('method "awmse" weights errors by importance, the mean squares of the inputs; give them')
    if importance is not None and importance.shape != (columns,):
        raise ShapeError(f"importance must be [{columns}], one for each input, found {list(importance.shape)}")


def _search_step(
    weight: Tensor, step: Tensor, middle: Tensor | None, bits: int, offset: OffsetKind, importance: Tensor | None
) -> Tensor:
    best_step, best_error = step, torch.full_like(step, float("inf"))
    for factor in _SHRINK_FACTORS:
        candidate = (step * factor).clamp_(min=MIN_STEP)
        at = None if offset == "zero" else half_step(candidate)
        if middle is not None and at is not None:
            at += middle
        error = dequantize(quantize(weight, candidate, at, bits)[0], candidate, at).sub_(weight).square_()
        if importance is not None:
            error *= importance.to(error)
        total = error.view(*step.shape, -1).sum(dim=-1)
        better = total < best_error
        best_step = torch.where(better, candidate, best_step)
        best_error = torch.where(better, total, best_error)
    return best_step


def normalise(weight: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """The real-valued code ``(weight - offset) / scale`` before clamping and rounding.

    Args:
        weight: [out, in]. scale, offset: [out, groups] with ``in % groups == 0``; ``offset=None`` is 0.

    Returns:
        [out, groups, in // groups], a fresh tensor in the promoted dtype. Peak bytes: the result.
    """
    grouped = weight.reshape(*scale.shape, -1)
    if offset is None:
        return grouped / scale.unsqueeze(-1)
    return (grouped - offset.unsqueeze(-1)).div_(scale.unsqueeze(-1))


def in_range(normalised: Tensor, bits: int) -> Tensor:
    """Bool mask of the unrounded codes less than ``TIE_TOLERANCE`` outside [QN, QP]; same shape."""
    low, high = bounds(bits)
    return (normalised > low - TIE_TOLERANCE) & (normalised < high + TIE_TOLERANCE)


def where_in_range(values: Tensor, normalised: Tensor, bits: int) -> Tensor:
    """``values`` where the unrounded code is ``in_range``, else 0: a fresh tensor, without one for the mask.

    Args:
        values, normalised: of one shape and dtype.
    """
    low, high = bounds(bits)
    # The gradient of a clamp to open bounds is this very function, in one pass where a mask of bools takes five.
    found: Tensor = torch.ops.aten.hardtanh_backward(values, normalised, low - TIE_TOLERANCE, high + TIE_TOLERANCE)
    return found


def round_codes(normalised: Tensor, bits: int) -> Tensor:
    """Clamp to [QN, QP] and round half to even; same shape and dtype, integer values."""
    # Adding 0 turns -0.0 into the +0.0 that an int8 code rebuilds, so both rebuild the same weight bit for
    # bit.
    return normalised.clamp(*bounds(bits)).round_().add_(0.0)


def quantize(weight: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes of a weight and the mask of those that were not clipped.

    The mask is taken on the *unrounded* code: a value in (QP, QP + 0.5] rounds to QP but is out of range.

    Args:
        weight: [out, in] fp32 (or fp64). scale: [out, in // group_size], positive. offset: like scale, or
            None for 0.

    Returns:
        codes int8 [out, in] in [QN, QP] and in_range bool [out, in].

    Raises:
        QuantError: bits. ShapeError: scale or offset does not fit the weight.

    Peak bytes: 2 x weight (fp32) beyond weight and results.
    """
    _check_grid(weight, scale, offset)
    normalised = normalise(weight, scale, offset)
    codes = round_codes(normalised, bits).to(torch.int8)
    return codes.view_as(weight), in_range(normalised, bits).view_as(weight)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """Weights ``codes * scale + offset``.

    Args:
        codes: [out, in] int8 (or the same integers as floats). scale: [out, in // group_size]. offset: like
            scale; None is a frozen 0.

    Returns:
        [out, in] in scale's dtype (fp32). Peak bytes: the result.

    Raises:
        ShapeError: scale or offset does not fit the codes.
    """
    _check_grid(codes, scale, offset)
    grouped = codes.reshape(*scale.shape, -1) * scale.unsqueeze(-1)
    if offset is not None:
        grouped += offset.unsqueeze(-1)
    return grouped.view_as(codes)


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes in [QN, QP] as uint8 in [0, 2**bits - 1], the form that is packed."""
    return (codes.to(torch.int16) - bounds(bits)[0]).to(torch.uint8)


def to_signed(codes: Tensor, bits: int) -> Tensor:
    """The int8 codes that ``to_unsigned`` was given."""
    return (codes.to(torch.int16) + bounds(bits)[0]).to(torch.int8)


def _check_grid(matrix: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    rows_match = matrix.dim() == 2 and scale.dim() == 2 and scale.shape[0] == matrix.shape[0]
    if not rows_match or not scale.shape[1] or matrix.shape[1] % scale.shape[1]:
        raise ShapeError(
            f"scale must be [out, groups] with groups dividing in: found scale {tuple(scale.shape)} "
            f"for a matrix {tuple(matrix.shape)}"
        )
    if offset is not None and offset.shape != scale.shape:
        raise ShapeError(f"offset must have scale's shape {tuple(scale.shape)}, found {tuple(offset.shape)}")

"""Error-compensated rounding of a matrix onto any grid: what one column loses, later columns make up for.

Source: GPTQ (arXiv 2210.17323), equations 2 and 3, in the Cholesky form of its section 3.3; here onto codebooks as well
as integers, along either axis of the stored blocks, most important columns first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quant.blockwise import (
    BlockQuantized,
    best_scale,
    block_range,
    check_blocks,
    check_weight,
    divisor,
    levels_for,
    range_scale,
    zero_codes,
)
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.scales import StoredScales, decode_scale, encode_scale, quantize_scales
from quant.storage import UNSEARCHED, Choice

# Columns whose corrections are applied one by one; the rest of the matrix gets them in one product afterwards.
_LAZY = 128

# Mean square over squared error of a column that rounds to itself; finite, so that solvers may invert it.
_EXACT = 1e30

# Scales grow while corrections accumulate: room above the largest first-level scale of a row.
_HEADROOM = 1.25


@dataclass(frozen=True)
class Feedback:
    """The order in which columns are rounded and how the error of each is passed on, for one input covariance.

    order: int64 [n], columns most important first; block: columns that stay together, or None. root: fp32 [n, n], upper
    Cholesky factor of the inverse of the damped covariance in that order; damping: what was added to its diagonal.
    """

    order: Tensor
    root: Tensor
    block: int | None
    damping: float

    def column_cost(self) -> Tensor:
        """fp32 [n]: what a squared rounding error of each column (in the matrix's own order) costs once all later
        columns have made up for it.

        Rounding errors e leave W - Q = (e / diag(root)) root. Row j of root costs 1 under the damped covariance, thus 1
        - damping |root_j|^2 under the covariance itself, so a column costs that over root_jj^2. The sum over columns is
        the loss exactly if nothing is damped, and its mean over independent errors else. Peak: 8 bytes an entry of
        `root`.
        """
        cost = torch.empty_like(self.root[0])
        squares = self.root.double().square_()
        cost[self.order] = ((1 - self.damping * squares.sum(dim=1)).clamp(min=0) / squares.diagonal()).float()
        return cost

    def chain(self) -> "Chain":
        """How errors of columns make later ones larger. Peak: two fp32 copies of `root`."""
        relative = self.root.triu(1).div_(self.root.diagonal()[:, None])
        return Chain(self.order, relative.square_().T.neg_())


@dataclass(frozen=True)
class Chain:
    """Of a Feedback, in its `order`: minus what a squared error of each column adds to the mean squares of later ones,
    fp32 [n, n], lower triangular; the diagonal is free."""

    order: Tensor
    passed_on: Tensor

    def growth(self, energy: Tensor, nearest: Tensor) -> Tensor:
        """How much larger squared errors are of columns that carry corrections: fp32 [n], 1 or more.

        `energy` and `nearest`, fp32 [n]: sums of squares of the columns as they are, and of their errors if they are
        rounded so. If a corrected column is rounded as coarsely as it would have been, and errors are independent, the
        errors e solve e_j = (nearest_j / energy_j) (energy_j + sum over earlier i of what e_i adds): a triangular
        system of positive terms.
        """
        energy, nearest = energy[self.order], nearest[self.order]
        self.passed_on.diagonal().copy_((energy / nearest).nan_to_num_(_EXACT).clamp_(max=_EXACT))
        solved = torch.linalg.solve_triangular(self.passed_on, energy[:, None], upper=False)[:, 0]
        found = torch.empty_like(energy)
        found[self.order] = torch.where(nearest > 0, solved / nearest, 1.0)
        return found


def passing_for(choice: Choice, passing: dict[int | None, Feedback] | None, transposed: bool) -> Feedback | None:
    """By the columns that stay together: those of a block, or each alone where blocks run along the outputs."""
    return None if passing is None else passing[None if transposed else choice.block_size]


@torch.no_grad()
def feedback(covariance: Tensor, block: int | None, damping: float = 0.01) -> Feedback:
    """Prepare rounding under `covariance` fp32 [n, n], damped by `damping` times its mean diagonal.

    `block`: consecutive columns that share a scale and so must be rounded together; they are ordered by their mean
    diagonal, columns inside a block by their own. None: every column on its own. Dead inputs (zero diagonal) come last
    and pass nothing on. Factorised in float64: a tenth of the diagonals of real covariances are lost in fp32. Peak: 16
    bytes an entry of `covariance`. Raises ShapeError when it is not square or blocks would be ragged, NonFiniteError
    for NaN or infinity, QuantError when it is not positive definite even damped.
    """
    n = covariance.shape[0]
    if covariance.shape != (n, n) or (block is not None and n % block):
        raise ShapeError(f"covariance must be [n, n] with n a multiple of {block or 1}, got {list(covariance.shape)}")
    if not bool(torch.isfinite(covariance).all()):
        raise NonFiniteError("covariance holds NaN or infinity")
    diagonal = covariance.diagonal().double()
    order = _order(diagonal, block)
    # For H = U U^T with U upper triangular, the upper factor of the inverse is U^-1; U is the lower factor of H with
    # rows and columns reversed, itself reversed.
    backwards = order.flip(0)
    damped = covariance[backwards][:, backwards].double()
    mean = float(diagonal.mean())
    added = damping * mean if mean > 0 else 1.0
    damped.diagonal().add_(added)
    factor, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if int(failed):
        raise QuantError("covariance is not positive definite; raise the damping or calibrate on more tokens")
    inverse = torch.eye(n, dtype=torch.float64, device=covariance.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return Feedback(order, inverse.float().flip(0, 1), block, added)


@torch.no_grad()
def quantize_compensated(
    weight: Tensor,
    choice: Choice,
    passing: Feedback,
    *,
    transposed: bool = False,
    levels: Tensor | None = None,
    multiples: Sequence[float] = UNSEARCHED,
) -> BlockQuantized:
    """Quantise fp32 `weight` [out, in] so that ``tr(E H E^T)`` is small, H the covariance behind `passing`.

    The result is of the stored orientation: [out, in], or [in, out] if `transposed`, blocks along its rows. Blocks'
    scales are set when their turn comes, by `best_scale` of weights that carry all earlier corrections, within
    second-level parameters fixed at the start with some headroom. Not transposed, `passing.block` must be the block
    size. Peak: three fp32 copies of `weight` beside it and one byte a weight. Raises ShapeError, QuantError,
    NonFiniteError as `quantize`.
    """
    check_weight(weight)
    _check_order(weight, passing, None if transposed else choice.block_size)
    levels = levels_for(choice, levels, multiples).to(weight.device)
    rounder = _Rounder(weight.T.contiguous() if transposed else weight, choice, levels, multiples)
    _round_columns(weight, passing, rounder, choice.block_size, transposed)
    return rounder.result()


@torch.no_grad()
def round_masked(
    weight: Tensor,
    passing: Feedback,
    mask: Tensor,
    scale: Tensor,
    levels: Tensor,
    zero: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Codes of fp32 `weight` [out, in] under given scales, with exact zeros where `mask`, bool [out, in], is True, so
    that ``tr(E H E^T)`` is small, H the covariance behind `passing`: columns make up for zeros as for rounding.

    uint8, of the stored orientation as in `quantize_compensated`, as are `scale` fp32 [rows, blocks] and `zero` uint8
    [rows, blocks] or None; `levels` fp32 [2**bits]. Peak: two fp32 copies of `weight` beside it and two bytes a weight.
    Raises ShapeError for shapes that do not fit, NonFiniteError, QuantError where no code stands for zero.
    """
    check_weight(weight)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ShapeError(f"expected a mask bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}")
    stored = weight.T if transposed else weight
    check_blocks(scale, stored)
    if zero is not None and zero.shape != scale.shape:
        raise ShapeError(f"zero {list(zero.shape)} does not fit scale {list(scale.shape)}")
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise NonFiniteError("weight holds NaN or infinity")
    size = stored.shape[1] // scale.shape[1]
    _check_order(weight, passing, None if transposed else size)
    rounder = _Masked(mask.T if transposed else mask, scale, levels, zero)
    _round_columns(weight, passing, rounder, size, transposed)
    return rounder.codes


class _Codes(Protocol):
    """What gives codes to the columns of a matrix, and says what these stand for."""

    def fix_scales(self, values: Tensor, block: int) -> None: ...

    def column(self, values: Tensor, column: int) -> Tensor: ...

    def row(self, values: Tensor, row: int) -> Tensor: ...


def _check_order(weight: Tensor, passing: Feedback, expected: int | None) -> None:
    if passing.block != expected:
        raise ShapeError(f"rounding order keeps blocks of {passing.block} together, expected {expected}")
    if passing.order.shape != (weight.shape[1],):
        raise ShapeError(f"covariance of {len(passing.order)} inputs does not fit {list(weight.shape)}")


def _round_columns(weight: Tensor, passing: Feedback, rounder: _Codes, block_size: int, transposed: bool) -> None:
    """Let `rounder` round one column of `weight` after the other, each with the corrections of all before it."""
    columns = weight[:, passing.order].T.contiguous()  # [in, out]: a column to round is a contiguous row
    span = block_size if not transposed else _LAZY
    for start in range(0, len(columns), span):
        part = slice(start, start + span)
        chosen, root = passing.order[part], passing.root[part, part]
        values, errors = columns[part], torch.empty_like(columns[part])
        if not transposed:
            rounder.fix_scales(values.T, int(chosen.min()) // block_size)
        for index, column in enumerate(chosen.tolist()):
            found = rounder.row(values[index], column) if transposed else rounder.column(values[index], column)
            errors[index] = (values[index] - found) / root[index, index]
            values[index + 1 :].addr_(root[index, index + 1 :], errors[index], alpha=-1)
        columns[start + span :].addmm_(passing.root[part, start + span :].T, errors, alpha=-1)


class _Masked:
    """Codes of a stored matrix whose scales are given, filled in any order; those of masked entries stand for zero."""

    def __init__(self, mask: Tensor, scale: Tensor, levels: Tensor, zero: Tensor | None) -> None:
        self.codes = torch.empty(mask.shape, dtype=torch.uint8, device=mask.device)
        self._mask, self._levels, self._scale = mask, levels, scale
        self._midpoints = (levels[1:] + levels[:-1]) / 2
        self._gone = zero_codes(levels, zero).expand_as(scale)
        self._zero = None if zero is None else zero.float()
        self._block = 0

    def fix_scales(self, values: Tensor, block: int) -> None:
        """The block of the columns that come next."""
        self._block = block

    def column(self, values: Tensor, column: int) -> Tensor:
        """Round one column [rows] of that block; what is stored for it, fp32 [rows]."""
        place = slice(None), self._block
        zero = None if self._zero is None else self._zero[place]
        codes, found = _nearest(values, self._scale[place], zero, self._levels, self._midpoints)
        gone = self._mask[:, column]
        self.codes[:, column] = torch.where(gone, self._gone[place], codes)
        return found.masked_fill_(gone, 0)

    def row(self, values: Tensor, row: int) -> Tensor:
        """Round one stored row [columns], blocks along it; what is stored for it, fp32 [columns]."""
        scale, zero = self._scale[row][:, None], None if self._zero is None else self._zero[row][:, None]
        codes, found = _nearest(values.view(len(scale), -1), scale, zero, self._levels, self._midpoints)
        gone = self._mask[row].view_as(codes)
        self.codes[row] = torch.where(gone, self._gone[row][:, None], codes).view(-1)
        return found.masked_fill_(gone, 0).view(-1)


class _Rounder:
    """Codes and scales of a stored matrix, filled in any order."""

    def __init__(self, stored_weight: Tensor, choice: Choice, levels: Tensor, multiples: Sequence[float]) -> None:
        low, high = block_range(stored_weight, choice.block_size)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise NonFiniteError("weight holds NaN or infinity")
        self.choice, self.levels, self.multiples = choice, levels, multiples
        # The offset is the smallest scale there may be, as it is: blocks of that scale are frequent in sparse rows.
        least = min(multiples) / _HEADROOM
        self.stored = quantize_scales(_HEADROOM * range_scale(low, high, choice), choice, least)
        self.codes = torch.empty(stored_weight.shape, dtype=torch.uint8, device=stored_weight.device)
        self.zero = torch.empty_like(low, dtype=torch.uint8) if choice.grid == "uint" else None
        self._midpoints = (levels[1:] + levels[:-1]) / 2
        self._scale = self._zero = low  # fp32 [rows], of the block being rounded

    def fix_scales(self, values: Tensor, block: int) -> None:
        """Scales of one block of columns, from its weights [rows, block_size] as they are now."""
        place = slice(block, block + 1)
        wanted, zero = best_scale(values, self.choice, self.levels, self.multiples)
        coded = encode_scale(wanted, self.stored, self.choice, place)
        self.stored.values[:, place] = coded
        self._scale = decode_scale(coded, self.stored, self.choice, place)[:, 0]
        if self.zero is not None and zero is not None:
            self.zero[:, place], self._zero = zero, zero[:, 0].float()

    def column(self, values: Tensor, column: int) -> Tensor:
        """Round one column [rows] of the block whose scales are fixed; what is stored for it, fp32 [rows]."""
        zero = None if self.zero is None else self._zero
        codes, found = _nearest(values, self._scale, zero, self.levels, self._midpoints)
        self.codes[:, column] = codes
        return found

    def row(self, values: Tensor, row: int) -> Tensor:
        """Round one stored row [columns], blocks along it; what is stored for it, fp32 [columns]."""
        stored = self._row_scales(row)
        wanted, zero = best_scale(values[None], self.choice, self.levels, self.multiples)
        coded = encode_scale(wanted, stored, self.choice)
        scale = decode_scale(coded, stored, self.choice).T
        blocks = values.view(len(scale), -1)
        codes, found = _nearest(blocks, scale, None if zero is None else zero.T.float(), self.levels, self._midpoints)
        self.codes[row], self.stored.values[row] = codes.view(-1), coded[0]
        if self.zero is not None and zero is not None:
            self.zero[row] = zero[0]
        return found.view(-1)

    def _row_scales(self, row: int) -> StoredScales:
        """The second level of one row, as if the row were the matrix."""
        place = slice(row, row + 1)
        if self.stored.maximum is None:
            return StoredScales(self.stored.values[place])
        if self.choice.superblock is None:
            return StoredScales(self.stored.values[place], self.stored.maximum[place], self.stored.offset)
        per_row = self.stored.values.shape[1]
        maxima = self.stored.maximum.repeat_interleave(self.choice.superblock)[row * per_row : (row + 1) * per_row]
        return StoredScales(self.stored.values[place], maxima, self.stored.offset)

    def result(self) -> BlockQuantized:
        return BlockQuantized(self.codes, self.levels, self.stored, self.zero)


def _nearest(
    values: Tensor, scale: Tensor, zero: Tensor | None, levels: Tensor, midpoints: Tensor
) -> tuple[Tensor, Tensor]:
    """What `encode_block` and `dequantize` find, without their preparations, which pay for a matrix only: codes int32
    and the fp32 values they stand for."""
    normalised = values / divisor(scale)
    if zero is not None:
        normalised += zero
    codes = torch.bucketize(normalised, midpoints, out_int32=True)
    found = levels.index_select(0, codes.view(-1)).view_as(values)
    if zero is not None:
        found -= zero
    return codes, found.mul_(scale)


def _order(diagonal: Tensor, block: int | None) -> Tensor:
    if block is None:
        return diagonal.argsort(descending=True, stable=True)
    blocks = diagonal.view(-1, block)
    inside = blocks.argsort(dim=1, descending=True, stable=True)
    first = blocks.mean(dim=1).argsort(descending=True, stable=True)
    return (inside + torch.arange(len(blocks), device=diagonal.device)[:, None] * block)[first].flatten()

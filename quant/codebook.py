"""Codebooks: NormalFloat, Lloyd, integers; and nearest-level encoding."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.storage import UNSEARCHED, Choice

CODEBOOK_BITS = (2, 3, 4, 8)

# Largest probability of the codebook: 1 - (1/30 + 1/32)/2. The published method keeps the 4-bit value at
# every width.
_P_MAX = 0.9677083

# Lloyd iterations end when no level moves by more than this, or after so many.
_SETTLED = 1e-7
_MOST_ITERATIONS = 20_000

# Times that scales are searched and levels are fitted in turn, iterations of such a fit, and the share of the draws
# that this is done on. Several times more of each changes the error of fresh draws, at 2 to 4 bits, by less than 1 %.
_ROUNDS, _STEPS, _SHARE = 16, 4, 16

# Up to so many values bisection is faster than `encode`'s preparations.
_FEW = 1 << 13

# Bounds the temporaries of `encode` to a few MB without paying for many kernel launches.
_CHUNK = 1 << 18


@lru_cache(maxsize=len(CODEBOOK_BITS))
def _normal_float_levels(bits: int) -> tuple[float, ...]:
    half = 2 ** (bits - 1)
    negative = torch.linspace(1 - _P_MAX, 0.5, half, dtype=torch.float64, device="cpu")[:-1]
    positive = torch.linspace(0.5, _P_MAX, half + 1, dtype=torch.float64, device="cpu")
    quantiles = torch.special.ndtri(torch.cat([negative, positive]))
    return tuple((quantiles / quantiles[-1]).tolist())


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels for `bits` in {2, 3, 4, 8}: fp32 [2**bits], increasing, on the CPU.

    The ends are -1 and +1 and level ``2**(bits-1) - 1`` is exactly zero, so the table has one more positive
    than negative level. Source: QLoRA (arXiv 2305.14314) appendix E, with the probability range LQ-LoRA
    (arXiv 2311.12023) uses at every width. Raises QuantError for any other width.
    """
    if bits not in CODEBOOK_BITS:
        raise QuantError(f"NormalFloat codebooks exist for {CODEBOOK_BITS} bits, not {bits}")
    return torch.tensor(_normal_float_levels(bits), dtype=torch.float32, device="cpu")


def levels_of(choice: Choice, multiples: Sequence[float] = UNSEARCHED) -> Tensor:
    """Levels that a choice stands for when the caller has none of their own: fp32 [2**bits], increasing, on the CPU.

    "nf": `normal_float`. "lloyd": `lloyd`, which depends on the `multiples` of a block's largest weight that are tried
    as its scale. "int": -2**(bits-1) .. 2**(bits-1) - 1. "uint": 0 .. 2**bits - 1.
    """
    count = 2**choice.bits
    if choice.grid == "nf":
        return normal_float(choice.bits)
    if choice.grid == "lloyd":
        return lloyd(choice.bits, choice.block_size, multiples)
    first = -count // 2 if choice.grid == "int" else 0
    return torch.arange(first, first + count, dtype=torch.float32, device="cpu")


def lloyd(
    bits: int, block_size: int, multiples: Sequence[float] = UNSEARCHED, *, samples: int = 1 << 20, seed: int = 0
) -> Tensor:
    """Lloyd codebook of Gaussian weights divided by their block's weight of largest magnitude, sign included: fp32
    [2**bits], increasing, on the CPU. Level ``2**(bits-1) - 1`` is 0 and the last is +1, both exactly.

    With other `multiples` than 1 a block's scale is the best of these times its largest weight, and levels and scales
    are fitted in turn: at 2 and 3 bits that is 14 and 9 % less squared error than the largest weight alone (blocks of
    64, fresh Gaussian draws).

    Minimises the expected squared error of a weight, that is the error of a normalised value times its block's scale
    squared, over about `samples` draws from `seed`; Lloyd 1982, Max 1960; for signed block maxima see BOF4 (arXiv
    2505.06653). The two fixed levels cost little error on Gaussian weights and are what a block with one huge weight
    needs: it keeps that weight, and its small ones do not become a large common offset. Computed once per process and
    arguments, in about a second. Peak: about 60 bytes a sample. Raises QuantError for a width without codebooks, or a
    block size that is not positive.
    """
    if bits not in CODEBOOK_BITS:
        raise QuantError(f"Lloyd codebooks exist for {CODEBOOK_BITS} bits, not {bits}")
    if block_size < 1:
        raise QuantError(f"block_size must be positive, got {block_size}")
    levels = _lloyd_levels(bits, block_size, tuple(multiples), samples, seed)
    return torch.tensor(levels, dtype=torch.float32, device="cpu")


@lru_cache(maxsize=64)
def _lloyd_levels(
    bits: int, block_size: int, multiples: tuple[float, ...], samples: int, seed: int
) -> tuple[float, ...]:
    if multiples != UNSEARCHED:
        return _searched_levels(bits, block_size, multiples, samples, seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = max(1, samples // block_size)
    draws = torch.randn(blocks, block_size, dtype=torch.float64, generator=generator, device="cpu")
    largest = draws.gather(1, draws.abs().argmax(dim=1, keepdim=True))
    weights = largest.square().expand_as(draws).flatten()
    init = normal_float(bits).double()
    pinned = torch.zeros(len(init), dtype=torch.bool, device="cpu")
    pinned[2 ** (bits - 1) - 1] = pinned[-1] = True
    return tuple(_iterate((draws / largest).flatten(), weights, init, pinned).tolist())


def _searched_levels(
    bits: int, block_size: int, multiples: tuple[float, ...], samples: int, seed: int
) -> tuple[float, ...]:
    """Lloyd levels and the best scale of each block, found in turn. Only zero is pinned: scales make up for the
    levels' common factor, which is taken out at the end of each round."""
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = max(1, samples // _SHARE // block_size)
    draws = torch.randn(blocks, block_size, dtype=torch.float64, generator=generator, device="cpu")
    largest = draws.gather(1, draws.abs().argmax(dim=1, keepdim=True))
    tried = torch.tensor(multiples, dtype=torch.float64, device="cpu").view(-1, 1, 1)
    normalised = draws / largest / tried
    levels = normal_float(bits).double()
    pinned = levels == 0
    for _ in range(_ROUNDS):
        nearest = levels[torch.bucketize(normalised, (levels[1:] + levels[:-1]) / 2)]
        errors = (normalised - nearest).square().sum(dim=2, keepdim=True) * tried.square()
        best = errors.argmin(dim=0, keepdim=True)
        values = normalised.gather(0, best.expand(1, *draws.shape))[0]
        weights = (largest * tried.view(-1)[best[0]]).square().expand_as(draws)
        levels = _iterate(values.flatten(), weights.flatten(), levels, pinned, _STEPS)
        levels = levels / levels[-1]
    return tuple(levels.tolist())


def lloyd_fit(values: Tensor, weights: Tensor | None, init: Tensor) -> Tensor:
    """Levels fp32 [k], increasing, that lower ``sum(weights * (values - nearest level)**2)`` from `init` [k] until they
    settle: weighted Lloyd iterations in float64.

    `values` are one matrix's own, divided by their blocks' scales, of any shape; `weights` has that shape, is not
    negative, and holds at least the squared scales; None is ones. A level nearest to no value stays where it was.
    Never worse than `init`, rounding to fp32 apart. Peak: about 60 bytes a value; pass a sample of a large matrix.

    Raises ShapeError when weights or `init` do not fit, QuantError for negative weights or an `init` that does not
    increase, NonFiniteError for NaN or infinity.
    """
    if weights is not None and weights.shape != values.shape:
        raise ShapeError(f"weights {list(weights.shape)} do not fit values {list(values.shape)}")
    if init.dim() != 1 or not len(init):
        raise ShapeError(f"init must be [levels], got {list(init.shape)}")
    for name, tensor in (("values", values), ("weights", weights), ("init", init)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name} hold NaN or infinity")
    if bool((init.diff() <= 0).any()):
        raise QuantError("init must increase")
    if weights is not None and bool((weights < 0).any()):
        raise QuantError("weights must not be negative")
    flat = values.reshape(-1).double()
    weight = torch.ones_like(flat) if weights is None else weights.reshape(-1).double()
    levels = _iterate(flat, weight, init.to(flat)).float()
    for index in range(1, len(levels)):  # fp32 can bring two levels together
        if levels[index] <= levels[index - 1]:
            levels[index] = torch.nextafter(levels[index - 1], levels.new_tensor(float("inf")))
    return levels


def _iterate(
    values: Tensor, weights: Tensor, levels: Tensor, pinned: Tensor | None = None, most: int = _MOST_ITERATIONS
) -> Tensor:
    """Lloyd iterations in float64 over 1-D values; levels marked in the bool mask `pinned` stay. Over sorted values a
    cell is a range, and its mean a difference of running sums."""
    values, order = values.sort()
    weights = weights[order]
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    moment = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    ends = torch.tensor([0, len(values)], device=values.device)
    for _ in range(most):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2, right=True)
        bounds = torch.cat([ends[:1], inner, ends[1:]])
        cell, total = mass[bounds].diff(), moment[bounds].diff()
        means = torch.where(cell > 0, total / torch.where(cell > 0, cell, 1.0), levels)
        if pinned is not None:
            means = torch.where(pinned, levels, means)
        moved = (means - levels).abs().amax()
        levels = means
        if float(moved) <= _SETTLED:
            break
    return levels


def encode(normalised: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest level of `codebook`: uint8, same shape as `normalised`.

    `normalised` is fp32 of any shape, `codebook` fp32 [levels <= 256], increasing. A value exactly on the
    midpoint of two levels takes the lower one; values beyond the ends take the end level, infinities
    included. NaN is the caller's to reject: its code is undefined. Allocates the result plus a few MB.
    """
    codebook = codebook.to(normalised.device)
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    values = normalised.reshape(-1)
    if len(values) <= _FEW:
        return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8).view(normalised.shape)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    low, high = float(codebook[0]), float(codebook[-1])
    cells = 4 * len(codebook)

    def cell_of(x: Tensor) -> Tensor:
        return ((x - low) * (cells / (high - low))).clamp_(0, cells).to(torch.int32)

    midpoint_cells = cell_of(midpoints)
    # `cell_of` never decreases, also after rounding. So while no cell holds two midpoints, the midpoints
    # below a value are those of lower cells plus possibly the one in its own cell: exact, and faster than
    # bisection.
    if bool((midpoint_cells[1:] == midpoint_cells[:-1]).any()):
        for start in range(0, len(values), _CHUNK):
            codes[start : start + _CHUNK] = torch.bucketize(values[start : start + _CHUNK], midpoints, out_int32=True)
        return codes.view(normalised.shape)
    midpoint_of = torch.full((cells + 1,), float("inf"), dtype=midpoints.dtype, device=values.device)
    midpoint_of[midpoint_cells.long()] = midpoints
    every_cell = torch.arange(cells + 1, dtype=torch.int32, device=values.device)
    codes_below = torch.bucketize(every_cell, midpoint_cells, out_int32=True).to(torch.uint8)
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        cell = cell_of(chunk)
        above = (chunk > midpoint_of.index_select(0, cell)).view(torch.uint8)
        torch.add(codes_below.index_select(0, cell), above, out=codes[start : start + _CHUNK])
    return codes.view(normalised.shape)

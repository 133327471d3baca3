"""Codebooks: NormalFloat, Lloyd, integers; and nearest-level encoding."""

from functools import lru_cache

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.storage import Choice

CODEBOOK_BITS = (2, 3, 4, 8)

# Largest probability of the codebook: 1 - (1/30 + 1/32)/2. The published method keeps the 4-bit value at
# every width.
_P_MAX = 0.9677083

# Lloyd iterations end when no level moves by more than this, or after so many.
_SETTLED = 1e-7
_MOST_ITERATIONS = 20_000

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


def levels_of(choice: Choice) -> Tensor:
    """Levels that a choice stands for when the caller has none of their own: fp32 [2**bits], increasing, on the CPU.

    "nf": `normal_float`. "lloyd": `lloyd`. "int": -2**(bits-1) .. 2**(bits-1) - 1. "uint": 0 .. 2**bits - 1.
    """
    count = 2**choice.bits
    if choice.grid == "nf":
        return normal_float(choice.bits)
    if choice.grid == "lloyd":
        return lloyd(choice.bits, choice.block_size)
    first = -count // 2 if choice.grid == "int" else 0
    return torch.arange(first, first + count, dtype=torch.float32, device="cpu")


def lloyd(bits: int, block_size: int, *, samples: int = 1 << 20, seed: int = 0) -> Tensor:
    """Lloyd codebook of Gaussian weights divided by their block's largest magnitude: fp32 [2**bits], increasing,
    symmetric (so without a zero), on the CPU.

    Minimises the expected squared error of a weight, that is the error of a normalised value times its block's scale
    squared, over about `samples` draws from `seed`; Lloyd 1982, Max 1960. Computed once per process and arguments, in
    about a second. Peak: about 60 bytes a sample. Raises QuantError for a width without codebooks, or a block size
    that is not positive.
    """
    if bits not in CODEBOOK_BITS:
        raise QuantError(f"Lloyd codebooks exist for {CODEBOOK_BITS} bits, not {bits}")
    if block_size < 1:
        raise QuantError(f"block_size must be positive, got {block_size}")
    return torch.tensor(_lloyd_levels(bits, block_size, samples, seed), dtype=torch.float32, device="cpu")


@lru_cache(maxsize=64)
def _lloyd_levels(bits: int, block_size: int, samples: int, seed: int) -> tuple[float, ...]:
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = max(1, samples // block_size)
    draws = torch.randn(blocks, block_size, dtype=torch.float64, generator=generator, device="cpu").abs_()
    absmax = draws.amax(dim=1, keepdim=True)
    weights = absmax.square().expand_as(draws)
    # The density is even and so is the best codebook: fit its positive half, whose cells then end at zero.
    values, weights = (draws / absmax).flatten(), weights.flatten()
    positive = _iterate(values, weights, _companded(values, weights, 2 ** (bits - 1)))
    return tuple(torch.cat([-positive.flip(0), positive]).tolist())


def _companded(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """`count` increasing levels in [0, 1] as dense as the cube root of the values' weight there, which is optimal for
    many levels (Panter and Dite 1951) and saves iterations that would hardly move."""
    bins = 1024
    weight = torch.bincount((values * bins).long().clamp_(max=bins - 1), weights, minlength=bins)
    density = weight.pow(1 / 3)
    ends = density.cumsum(0)
    targets = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count * ends[-1]
    index = torch.searchsorted(ends, targets)
    return (index + 1 - (ends[index] - targets) / density[index]) / bins


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


def _iterate(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Lloyd iterations in float64 over 1-D values. Over sorted values a cell is a range, and its mean a
    difference of running sums."""
    values, order = values.sort()
    weights = weights[order]
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    moment = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    ends = torch.tensor([0, len(values)], device=values.device)
    for _ in range(_MOST_ITERATIONS):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2, right=True)
        bounds = torch.cat([ends[:1], inner, ends[1:]])
        cell, total = mass[bounds].diff(), moment[bounds].diff()
        means = torch.where(cell > 0, total / torch.where(cell > 0, cell, 1.0), levels)
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

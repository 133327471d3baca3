"""Blockwise quantisation of a matrix: ranges, nearest codes against given scales, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quant.codebook import encode, levels_of
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.scales import StoredScales, quantize_scales, scales
from quant.storage import UNSEARCHED, Choice

# Elements handled at once: bounds the temporaries to a few MB, which also keeps them in the CPU's cache.
_CHUNK = 1 << 18

# Codes from which on a table of pairs of levels pays.
_FEW = 1 << 14


@dataclass(frozen=True)
class BlockQuantized:
    """A quantised [rows, columns] matrix.

    codes: uint8 [rows, columns]. levels: fp32 [2**bits], increasing. scales: as stored, of [rows, blocks]. zero:
    uint8 [rows, blocks], the code whose value is zero, on the grid "uint"; else None.
    """

    codes: Tensor
    levels: Tensor
    scales: StoredScales
    zero: Tensor | None = None


@torch.no_grad()
def quantize(
    weight: Tensor, choice: Choice, levels: Tensor | None = None, multiples: Sequence[float] = UNSEARCHED
) -> BlockQuantized:
    """Quantise fp32 `weight` [rows, columns] to the nearest codes; `levels` fp32 [2**bits], increasing, replace those
    of ``levels_of(choice, multiples)`` on the grids "nf" and "lloyd".

    Scales are those of `best_scale`. Codes are taken against the scale that `scales` will rebuild, so `rebuild` is what
    was scored. A block whose rebuilt scale is zero gets the code nearest to zero.

    Peak: one byte a weight for the result plus a few MB. Raises ShapeError when blocks or superblocks would be
    ragged, QuantError for another dtype or bad levels, NonFiniteError for NaN or infinity, or scales that
    scale_dtype cannot hold.
    """
    check_weight(weight)
    choice.superblocks(*weight.shape)
    levels = levels_for(choice, levels, multiples).to(weight.device)
    # The extremes carry any NaN or infinity and, unlike a mask, take no memory.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise NonFiniteError("weight holds NaN or infinity")
    scale, zero = best_scale(weight, choice, levels, multiples)
    stored = quantize_scales(scale, choice)
    return BlockQuantized(encode_block(weight, scales(stored, choice), levels, zero), levels, stored, zero)


def check_weight(weight: Tensor) -> None:
    """Raises ShapeError or QuantError unless `weight` is an fp32 matrix."""
    if weight.dim() != 2:
        raise ShapeError(f"weight must be [rows, columns], got {list(weight.shape)}")
    if weight.dtype != torch.float32:
        raise QuantError(f"weight must be float32, got {weight.dtype}")


def levels_for(choice: Choice, levels: Tensor | None, multiples: Sequence[float] = UNSEARCHED) -> Tensor:
    """`levels` if they are some and fit `choice`, else QuantError; without any those of `levels_of`."""
    if levels is None:
        return levels_of(choice, multiples)
    if choice.grid in ("int", "uint"):
        raise QuantError(f"the levels of grid {choice.grid!r} are its integers, leave levels out")
    if levels.shape != (2**choice.bits,) or levels.dtype != torch.float32:
        raise QuantError(f"levels must be float32 [{2**choice.bits}], got {levels.dtype} {list(levels.shape)}")
    if not bool(torch.isfinite(levels).all() and (levels.diff() > 0).all()):
        raise QuantError("levels must be finite and increasing")
    return levels


def block_range(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every block, each [rows, blocks]; ShapeError when the last would be ragged."""
    rows, columns = weight.shape
    if columns < 1 or columns % block_size:
        raise ShapeError(f"{columns} columns do not split into blocks of {block_size}")
    blocks = weight.reshape(rows, -1, block_size)
    return blocks.amin(dim=2), blocks.amax(dim=2)  # several times faster on the CPU than aminmax along a dimension


def range_scale(low: Tensor, high: Tensor, choice: Choice) -> Tensor:
    """The smallest scale [rows, blocks] at which no weight between `low` and `high` is clipped.

    "nf": the largest magnitude, for levels normalised to it. "lloyd": the weight of largest magnitude, with its sign.
    "int": the larger of ``high / (2**(bits-1) - 1)`` and ``-low / 2**(bits-1)``, so the code -2**(bits-1) is used where
    the negative side needs it. "uint": the range from min(low, 0) to max(high, 0) in 2**bits - 1 steps, so that zero
    stays representable.
    """
    if choice.grid == "int":
        half = 2 ** (choice.bits - 1)
        return torch.maximum(high / (half - 1), -low / half)
    if choice.grid == "uint":
        return torch.div(high.clamp(min=0) - low.clamp(max=0), 2**choice.bits - 1)
    if choice.signed_scales:
        return torch.where(high >= -low, high, low)
    return torch.maximum(high.abs(), low.abs())


@torch.no_grad()
def best_scale(
    values: Tensor, choice: Choice, levels: Tensor, multiples: Sequence[float]
) -> tuple[Tensor, Tensor | None]:
    """Scale fp32 [rows, blocks] of each block of fp32 `values` [rows, columns], and on the grid "uint" its zero point,
    uint8 [rows, blocks].

    Of `range_scale` times each of `multiples` it is the one whose nearest codes leave the least squared error, the
    earlier of equals: a smaller scale clips the largest weights and serves all others better. Range and scale shrink
    alike, so the zero point, 0 where the scale is, is that of the whole range. Peak: the result plus a few MB, or as
    much as a row times `multiples` takes. NaN and infinity are the caller's to reject. Raises ShapeError when the
    blocks would be ragged.
    """
    low, high = block_range(values, choice.block_size)
    base, zero = range_scale(low, high, choice), None
    if choice.grid == "uint":
        zero = (-low.clamp(max=0) / divisor(base)).round_().clamp_(0, 2**choice.bits - 1).to(torch.uint8)
    if tuple(multiples) == UNSEARCHED:
        return base, zero
    tried = torch.tensor(multiples, dtype=base.dtype, device=base.device).view(-1, 1, 1)
    best = torch.empty_like(base)
    rows, columns = values.shape
    step = max(1, _CHUNK // (columns * len(tried)))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scale = tried * base[part]
        normalised = values[part].reshape(1, *scale.shape[1:], -1) / divisor(scale).unsqueeze(-1)
        if zero is not None:
            normalised += zero[part].unsqueeze(-1)
        found = levels.index_select(0, encode(normalised, levels).view(-1).to(torch.int32)).view_as(normalised)
        errors = found.sub_(normalised).square_().sum(dim=-1).mul_(scale.square())
        best[part] = scale.gather(0, errors.argmin(dim=0, keepdim=True))[0]
    return best, zero


@torch.no_grad()
def encode_block(values: Tensor, scale: Tensor, levels: Tensor, zero: Tensor | None = None) -> Tensor:
    """Nearest codes uint8 [rows, columns] of fp32 `values` [rows, columns] against given `scale` [rows, blocks] of
    either sign, `levels` and, on the grid "uint", `zero` [rows, blocks].

    Inverse of `dequantize`. Where the scale is zero, the code nearest to zero. Any number of columns that the blocks
    divide, one column a block included. Peak: the result plus a few MB. Raises ShapeError when they do not divide.
    """
    rows, columns = values.shape
    check_blocks(scale, values)
    blocks, divisors = scale.shape[1], divisor(scale).unsqueeze(-1)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=values.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        normalised = values[part].reshape(-1, blocks, columns // blocks) / divisors[part]
        if zero is not None:
            normalised += zero[part].unsqueeze(-1)
        codes[part] = encode(normalised.view(-1, columns), levels)
    return codes


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor, levels: Tensor, zero: Tensor | None = None) -> Tensor:
    """Weights fp32 [rows, columns] from uint8 `codes` [rows, columns], fp32 `scale` [rows, blocks], fp32 `levels`
    [2**bits] and uint8 `zero` [rows, blocks] or None: ``scale * (levels[code] - zero)``.

    Peak: four bytes a weight for the result plus a few MB. Raises ShapeError when the blocks do not divide
    the columns.
    """
    rows, columns = codes.shape
    check_blocks(scale, codes)
    flat = codes.reshape(-1)
    # Two neighbouring codes read as one index halve the look-ups; at 8 bits the table of pairs would outgrow
    # the cache, and for few codes it costs more than it saves.
    paired = len(levels) < 256 and codes.numel() >= _FEW and columns % 2 == 0 and flat.storage_offset() % 2 == 0
    table = levels
    if paired:
        table = levels.index_select(0, _pair_index(len(levels), codes.device)).view(torch.int64)
    index = (flat.view(torch.int16) if paired else flat).view(rows, -1)
    blocks = scale.shape[1]
    weight = torch.empty(rows, blocks, columns // blocks, dtype=torch.float32, device=codes.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        found = table.index_select(0, index[part].reshape(-1).to(torch.int32)).view(torch.float32)
        found = found.view_as(weight[part])
        if zero is not None:
            found.sub_(zero[part].unsqueeze(-1))
        torch.mul(found, scale[part].unsqueeze(-1), out=weight[part])
    return weight.view(rows, columns)


def rebuild(quantized: BlockQuantized, choice: Choice) -> Tensor:
    """The weights fp32 [rows, columns] that `quantized` stands for. Peak: as `dequantize`."""
    return dequantize(quantized.codes, scales(quantized.scales, choice), quantized.levels, quantized.zero)


def zero_codes(levels: Tensor, zero: Tensor | None) -> Tensor:
    """The code whose weight is exactly zero at every scale: `zero`, uint8 [rows, blocks], where a block has its own,
    else that of the level 0, [1, 1]. Raises QuantError if no level is 0, as after levels were tuned."""
    if zero is not None:
        return zero
    found = (levels == 0).nonzero()
    if not len(found):
        raise QuantError("no level stands for an exact zero; take levels that were not tuned, or an integer grid")
    return found[:1].to(torch.uint8)


@lru_cache(maxsize=16)
def _pair_index(count: int, device: torch.device) -> Tensor:
    """int32 [2 * pairs]: the two codes, each below `count`, behind every value of a pair read as int16."""
    pairs = torch.arange((count - 1) * 257 + 1, dtype=torch.int16, device="cpu").view(torch.uint8).to(torch.int32)
    # Values that stand for no pair of codes are never looked up.
    return pairs.clamp_(max=count - 1).to(device)


def divisor(scale: Tensor) -> Tensor:
    """What weights of blocks with these scales are divided by: x / inf = 0, which encodes as zero."""
    return torch.where(scale == 0, float("inf"), scale)


def check_blocks(scale: Tensor, like: Tensor) -> None:
    """Raises ShapeError unless `scale` is [rows, blocks] of a matrix of the shape of `like`."""
    rows, columns = like.shape
    if scale.dim() != 2 or scale.shape[0] != rows or scale.shape[1] < 1 or columns % scale.shape[1]:
        raise ShapeError(f"scale {list(scale.shape)} does not fit {list(like.shape)}")

"""First-level scales as they are stored: double-quantised as in LQ-LoRA, or direct.

Rounding code may fix the second level from provisional scales (`quantize_scales`), then code scales that it decides
later, a few blocks at a time (`encode_scale`); `scales` is what a reader rebuilds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.storage import Choice

# A superblock whose scales differ by no more than this has nothing to encode: every scale is the offset.
_SMALLEST_SCALE_MAX = 2.0**-24

ALL_BLOCKS = slice(None)


@dataclass(frozen=True)
class StoredScales:
    """Scales of a [rows, blocks] grid.

    values: uint8 codes [rows, blocks], or the scales themselves in the choice's scale_dtype. maximum: [superblocks]
    in scale_dtype, the largest scale above the offset in each; offset: fp32 [1], the smallest scale of the matrix.
    Both are None for direct scales.
    """

    values: Tensor
    maximum: Tensor | None = None
    offset: Tensor | None = None


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype that a Choice names."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def quantize_scales(scale: Tensor, choice: Choice, least: float = 1.0) -> StoredScales:
    """Store fp32 `scale` [rows, blocks] as `choice` says.

    Double quantisation is LQ-LoRA's (arXiv 2311.12023): offset = the smallest scale (times `least`, for scales that
    are still to shrink), then unsigned integers times the superblock's maximum. A superblock whose scales are equal to
    within 2**-24 gets code 0. On a grid with signed scales ("lloyd") that is done to magnitudes with one bit less, and
    the top bit of a code is the sign.

    Raises ShapeError when superblocks would be ragged, QuantError for another dtype, NonFiniteError for NaN or
    infinity or scales that scale_dtype cannot hold.
    """
    if scale.dim() != 2 or scale.dtype != torch.float32:
        raise QuantError(f"scales must be float32 [rows, blocks], got {scale.dtype} {list(scale.shape)}")
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError("scales hold NaN or infinity")
    dtype = torch_dtype(choice.scale_dtype)
    if choice.direct:
        return StoredScales(_held(scale, dtype))
    superblocks = choice.superblocks(len(scale), scale.shape[1] * choice.block_size)
    magnitude = scale.abs()
    offset = least * magnitude.amin().view(1)
    maximum = _held((magnitude - offset).view(superblocks, -1).amax(dim=1), dtype)
    second_level = StoredScales(scale, maximum, offset)
    return StoredScales(encode_scale(scale, second_level, choice), maximum, offset)


def encode_scale(scale: Tensor, stored: StoredScales, choice: Choice, blocks: slice = ALL_BLOCKS) -> Tensor:
    """What `stored.values` would hold in columns `blocks` for fp32 `scale` [rows, blocks]: the nearest codes within
    the second level of `stored`, or the scales in their dtype; NonFiniteError if that cannot hold them."""
    if stored.maximum is None or stored.offset is None:
        return _held(scale, stored.values.dtype)
    maximum = _spread(stored, stored.maximum, blocks)
    maximum = torch.where(maximum > _SMALLEST_SCALE_MAX, maximum, float("inf"))
    largest = _largest(choice)
    magnitude: Tensor = (scale.abs() - stored.offset) * largest / maximum
    codes = magnitude.round_().clamp_(0, largest).to(torch.uint8)
    return codes + (scale < 0).to(torch.uint8) * (largest + 1) if choice.signed_scales else codes


def decode_scale(values: Tensor, stored: StoredScales, choice: Choice, blocks: slice = ALL_BLOCKS) -> Tensor:
    """fp32 scales of `values` [rows, blocks], which stand (or would) in columns `blocks` of `stored.values`.

    This is the one definition of a scale.
    """
    if stored.maximum is None or stored.offset is None:
        return values.float()
    largest = _largest(choice)
    magnitude = (values & largest).float() * _spread(stored, stored.maximum, blocks) / largest + stored.offset
    return torch.where(values > largest, -magnitude, magnitude) if choice.signed_scales else magnitude


def scales(stored: StoredScales, choice: Choice) -> Tensor:
    """First-level scales fp32 [rows, blocks]; slicing whole superblocks of `stored` slices the result.

    Raises ShapeError when codes and maxima do not match.
    """
    rows, blocks = stored.values.shape
    if stored.maximum is not None and stored.maximum.shape != (choice.superblocks(rows, blocks * choice.block_size),):
        found = f"{[rows, blocks]} do not fit {list(stored.maximum.shape)} maxima of {choice.name}"
        raise ShapeError(f"scale codes {found}")
    return decode_scale(stored.values, stored, choice)


def _largest(choice: Choice) -> int:
    """The largest magnitude of a scale code."""
    return int(2 ** (choice.scale_bits - choice.signed_scales)) - 1


def _held(values: Tensor, dtype: torch.dtype) -> Tensor:
    held = values.to(dtype)
    if not bool(torch.isfinite(held).all()):
        raise NonFiniteError(f"block scales are too large for {dtype}; use bfloat16 or float32 scales")
    return held


def _spread(stored: StoredScales, maximum: Tensor, blocks: slice) -> Tensor:
    """The maximum of each block's superblock: fp32 [rows, blocks], or [rows, 1] where superblocks are rows."""
    rows, per_row = stored.values.shape
    if len(maximum) == rows:
        return maximum.float().view(-1, 1)
    size = rows * per_row // len(maximum)
    return maximum.float().repeat_interleave(size).view(rows, per_row)[:, blocks]

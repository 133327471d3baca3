"""What the layers share that rebuild their weight at every use instead of keeping it.

Both ``quant.fakequant`` and ``quant.linear`` walk over rows of the stored matrix, rebuild a chunk, multiply,
drop it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.exceptions import ShapeError

CHUNK_ELEMENTS = 1 << 20
"""Weights rebuilt at once when no row chunk is asked for: 4 MiB per fp32 transient."""


def row_chunks(rows: int, columns: int, row_chunk: int | None = None) -> Iterator[slice]:
    """Slices covering ``rows`` in order, each ``row_chunk`` rows (default: about ``CHUNK_ELEMENTS`` weights).

    The same arguments give the same slices, so a matrix product taken per chunk rounds the same way each
    time.

    Raises:
        ShapeError: ``row_chunk`` is not positive.
    """
    if row_chunk is None:
        row_chunk = max(1, CHUNK_ELEMENTS // max(1, columns))
    if row_chunk < 1:
        raise ShapeError(f"row_chunk must be at least 1, found {row_chunk}")
    for start in range(0, rows, row_chunk):
        yield slice(start, min(rows, start + row_chunk))


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in the dtype autocast would give a matrix product here; fp64 is left alone."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def without_autocast(x: Tensor) -> torch.autocast:
    """Context in which the products that rebuild a weight keep their own dtype."""
    return torch.autocast(x.device.type, enabled=False)


def check_input(x: Tensor, in_features: int) -> None:
    """Raises ShapeError unless ``x`` is [..., in_features]."""
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ShapeError(f"input must be [..., {in_features}], found shape {tuple(x.shape)}")


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in place; a half-precision product joins an fp32 total."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right

"""NormalFloat codebooks and nearest-level encoding."""

from functools import lru_cache

import torch
from torch import Tensor

from quant.exceptions import QuantError

CODEBOOK_BITS = (2, 3, 4, 8)

# Largest probability of the codebook: 1 - (1/30 + 1/32)/2. The published method keeps the 4-bit value at
# every width.
_P_MAX = 0.9677083

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


def encode(normalised: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest level of `codebook`: uint8, same shape as `normalised`.

    `normalised` is fp32 of any shape, `codebook` fp32 [levels <= 256], increasing. A value exactly on the
    midpoint of two levels takes the lower one; values beyond the ends take the end level, infinities
    included. NaN is the caller's to reject: its code is undefined. Allocates the result plus a few MB.
    """
    codebook = codebook.to(normalised.device)
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    values = normalised.reshape(-1)
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

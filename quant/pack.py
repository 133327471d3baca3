"""Packing of small codes into int32 words, row by row, so that slicing rows commutes with packing.

Layouts. 2, 4 and 8 bits: ``32 // bits`` codes a word, first code in the least significant bits. 3 bits: bit
planes, three words for 32 codes, word p holding bit p of each, code k at bit k. The tail of a row is filled
with zero codes up to whole words (3 bits: up to a whole group of three). Words are reinterpreted as bytes
below, which is this layout on little-endian memory only; every platform PyTorch publishes wheels for is
little-endian.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quant.exceptions import QuantError, ShapeError
from quant.storage import WORD_BITS, packed_columns

_BYTE_ONES = 0x0101010101010101


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [rows, columns], each below ``2**bits``, into int32 [rows, packed_columns(columns,
    bits)].

    Peak: three bytes a code beside the input. Raises ShapeError for a tensor that is not 2-D, QuantError for
    a dtype other than uint8 or an unknown width. Codes of ``2**bits`` or more would corrupt their neighbours
    and are refused.
    """
    if codes.dim() != 2:
        raise ShapeError(f"codes must be [rows, columns], got {list(codes.shape)}")
    if codes.dtype != torch.uint8:
        raise QuantError(f"codes must be uint8, got {codes.dtype}")
    rows, columns = codes.shape
    words = packed_columns(columns, bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise QuantError(f"code {int(codes.max())} does not fit in {bits} bits")
    padded = torch.nn.functional.pad(codes, (0, words * WORD_BITS // bits - columns)).contiguous()
    if bits == 3:
        return _pack_planes(padded.view(rows, words // 3, 32))
    slots = padded.view(rows, words * 4, 8 // bits)
    packed = slots[..., 0].clone(memory_format=torch.contiguous_format)
    for slot in range(1, 8 // bits):
        packed |= slots[..., slot] << slot * bits
    return packed.view(torch.int32)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: int32 [rows, words] to uint8 codes [rows, columns], contiguous.

    Peak: twice the result. Raises ShapeError when the row length is not packed_columns(columns, bits),
    QuantError for a dtype other than int32 or an unknown width.
    """
    if words.dtype != torch.int32:
        raise QuantError(f"packed words must be int32, got {words.dtype}")
    if words.dim() != 2 or words.shape[1] != packed_columns(columns, bits):
        expected = packed_columns(columns, bits)
        raise ShapeError(f"{columns} codes of {bits} bits take [rows, {expected}] words, got {list(words.shape)}")
    rows = words.shape[0]
    octets = words.contiguous().view(torch.uint8)
    if bits == 3:
        codes = _unpack_planes(octets.view(rows, words.shape[1] // 3, 3, 4))
    elif bits == 8:
        codes = octets.clone()
    else:
        mask = 2**bits - 1
        codes = torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], dim=-1)
    return codes.view(rows, words.shape[1] * WORD_BITS // bits)[:, :columns].contiguous()


def _pack_planes(groups: Tensor) -> Tensor:
    """uint8 [rows, groups, 32] to int32 [rows, 3 * groups]; eight codes are handled as one int64."""
    rows, count, _ = groups.shape
    octets = torch.empty(rows, count, 3, 4, dtype=torch.uint8, device=groups.device)
    eights = groups.view(torch.int64)
    for plane in range(3):
        # The product moves the lowest bit of byte k to bit 56 + k; no two terms meet, so nothing carries.
        gathered = (((eights >> plane) & _BYTE_ONES) * 0x0102040810204080) >> 56
        octets[:, :, plane] = gathered.to(torch.uint8)
    return octets.view(torch.int32).view(rows, 3 * count)


def _unpack_planes(octets: Tensor) -> Tensor:
    """uint8 [rows, groups, 3, 4] plane bytes to uint8 codes [rows * groups * 32]."""
    spread = _spread_table(octets.device)
    codes = spread[0].index_select(0, octets[:, :, 0].reshape(-1).to(torch.int32))
    for plane in (1, 2):
        codes |= spread[plane].index_select(0, octets[:, :, plane].reshape(-1).to(torch.int32))
    return codes.view(torch.uint8)


@lru_cache(maxsize=16)
def _spread_table(device: torch.device) -> Tensor:
    """int64 [3, 256]: byte k of entry [p, b] is bit k of b, moved to bit p. Read only."""
    byte = torch.arange(256, device="cpu")
    bits = ((byte[:, None] >> torch.arange(8, device="cpu")) & 1).to(torch.uint8).contiguous()
    plane = bits.view(torch.int64).view(1, 256)
    return torch.cat([plane, plane << 1, plane << 2]).to(device)

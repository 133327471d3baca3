"""Weights straight from packed words: unpacking, look-up and scaling without codes in between.

A few packed bits are one index into a table that holds all the weights they stand for before scaling, so a look-up
yields up to four weights. The numbers are those of quant.pack.unpack followed by quant.blockwise.dequantize, bit for
bit: the same level, minus the same zero, times the same scale.
"""

from functools import lru_cache

import torch
from torch import Tensor

from quant.exceptions import ShapeError
from quant.storage import packed_columns

# A word's nibble of each of three bit planes: 12 bits, 4 codes.
_NIBBLES = 3 * 4


def dequantize_packed(
    words: Tensor, bits: int, columns: int, scale: Tensor, levels: Tensor, zero: Tensor | None = None
) -> Tensor:
    """Weights fp32 [rows, columns] from int32 `words` [rows, packed_columns(columns, bits)], fp32 `scale`
    [rows, blocks], fp32 `levels` [2**bits] and uint8 `zero` [rows, blocks] or None.

    Peak: eight bytes a weight, the result included. Raises ShapeError when words or blocks do not fit the columns.
    """
    rows, blocks = scale.shape
    if words.shape != (rows, packed_columns(columns, bits)) or columns % blocks:
        raise ShapeError(
            f"words {list(words.shape)} and scale {[rows, blocks]} do not fit {columns} codes of {bits} bits"
        )
    octets = words.view(torch.uint8)
    index = _plane_index(octets.view(rows, -1, 3, 4)) if bits == 3 else octets
    table = levels.index_select(0, _codes_behind(bits, levels.device))
    per_index = len(table) >> (_NIBBLES if bits == 3 else 8)
    # One wide element is fetched at once, four floats are not.
    wide = table.view({1: torch.float32, 2: torch.int64, 4: torch.complex128}[per_index])
    weight = wide.index_select(0, index.reshape(-1).to(torch.int32)).view(torch.float32)
    weight = weight.view(rows, -1)[:, :columns].reshape(rows, blocks, columns // blocks)
    if zero is not None:
        weight = weight - zero.unsqueeze(-1)
    return (weight * scale.unsqueeze(-1)).view(rows, columns)


def _plane_index(octets: Tensor) -> Tensor:
    """uint8 [rows, groups, 3, 4] plane bytes to int16 [rows, groups, 4, 2]: nibble n of byte b of plane p at bit 4p."""
    first, second, third = octets.movedim(2, 0).contiguous()
    index = torch.empty(*first.shape, 2, 2, dtype=torch.uint8, device=octets.device)
    index[..., 0, 0] = (first & 15) | (second << 4)
    index[..., 0, 1] = third & 15
    index[..., 1, 0] = (first >> 4) | (second & 240)
    index[..., 1, 1] = third >> 4
    # Two bytes, the lower first, are one index.
    return index.view(torch.int16)


@lru_cache(maxsize=16)
def _codes_behind(bits: int, device: torch.device) -> Tensor:
    """int32, flat: the codes that every value of an index stands for, in order. Read only."""
    if bits == 3:
        index = torch.arange(2**_NIBBLES, dtype=torch.int32, device="cpu").unsqueeze(1)
        code = torch.arange(4, device="cpu")
        codes = (index >> code & 1) | (index >> (4 + code) & 1) << 1 | (index >> (8 + code) & 1) << 2
    else:
        index = torch.arange(256, dtype=torch.int32, device="cpu").unsqueeze(1)
        codes = index >> torch.arange(0, 8, bits, device="cpu") & (2**bits - 1)
    return codes.to(torch.int32).flatten().to(device)

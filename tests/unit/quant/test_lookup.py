"""The fused path from packed words to weights is the plain one, bit for bit."""

import pytest
import torch

from quant.blockwise import dequantize
from quant.exceptions import ShapeError
from quant.lookup import dequantize_packed
from quant.pack import pack


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
# 24 and 40 codes fill no whole number of 3-bit groups, 20 codes of 3 bits end inside a plane's byte.
@pytest.mark.parametrize(("columns", "block"), [(64, 16), (24, 24), (40, 8), (20, 5), (7, 7)])
@pytest.mark.parametrize("with_zero", [False, True])
def test_same_bits_as_unpacking_first(bits: int, columns: int, block: int, with_zero: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (33, columns), dtype=torch.uint8, generator=generator)
    scale = torch.randn(33, columns // block, generator=generator)
    levels = torch.randn(2**bits, generator=generator).sort().values
    zero = torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator) if with_zero else None
    found = dequantize_packed(pack(codes, bits), bits, columns, scale, levels, zero)
    assert found.is_contiguous()
    assert torch.equal(found, dequantize(codes, scale, levels, zero))


def test_rows_of_words_that_are_a_view() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(4, 16) % 8
    words, scale, levels = pack(codes, 3), torch.ones(4, 1), torch.arange(8.0)
    wide = torch.cat([words, words], dim=1)[1:, 3:]
    assert torch.equal(dequantize_packed(wide, 3, 16, scale[1:], levels), codes[1:].float())


@pytest.mark.parametrize(("columns", "blocks"), [(17, 1), (8, 1), (16, 3)])
def test_what_does_not_fit_is_refused(columns: int, blocks: int) -> None:
    words = pack(torch.zeros(2, 16, dtype=torch.uint8), 4)
    with pytest.raises(ShapeError, match="do not fit"):
        dequantize_packed(words, 4, columns, torch.ones(2, blocks), torch.zeros(16))

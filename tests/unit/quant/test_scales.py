import pytest
import torch

from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.scales import StoredScales, decode_scale, encode_scale, quantize_scales, scales
from quant.storage import Choice


def _wanted(rows=6, blocks=8, seed=0):
    return torch.rand(rows, blocks, generator=torch.Generator().manual_seed(seed)) + 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_direct_scales_are_the_scales(dtype):
    choice = Choice("int", 4, 32, 0, 32 if dtype == "float32" else 16, dtype)
    wanted = _wanted() - 0.6
    stored = quantize_scales(wanted, choice)
    assert (stored.maximum, stored.offset) == (None, None)
    assert stored.values.dtype == getattr(torch, dtype)
    assert torch.equal(stored.values, wanted.to(stored.values.dtype))
    assert torch.equal(scales(stored, choice), stored.values.float())
    assert torch.equal(encode_scale(wanted[:, 2:5], stored, choice, slice(2, 5)), stored.values[:, 2:5])


@pytest.mark.parametrize("scale_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("superblock", [None, 2, 12])
def test_codes_are_the_nearest_within_the_second_level(scale_bits, superblock):
    choice = Choice("nf", 3, 32, 0, scale_bits, "float32", superblock)
    wanted = _wanted()
    stored = quantize_scales(wanted, choice)
    assert stored.values.dtype == torch.uint8
    assert stored.offset.item() == wanted.min().item()
    every = torch.stack(
        [decode_scale(torch.full((6, 8), code, dtype=torch.uint8), stored, choice) for code in range(2**scale_bits)]
    )
    nearest = (every - wanted).abs().amin(dim=0)
    # 1e-6: fp32 rounding where a scale lies half way between two codes.
    assert bool(((scales(stored, choice) - wanted).abs() <= nearest + 1e-6).all())


@pytest.mark.parametrize("superblock", [None, 2, 3, 12])
def test_scales_decided_later_take_the_second_level_as_it_is(superblock):
    choice = Choice("nf", 3, 32, 0, 4, "bfloat16", superblock)
    stored = quantize_scales(_wanted(), choice)
    later = _wanted(seed=1)
    whole = encode_scale(later, stored, choice)
    assert int(whole.max()) <= 15
    for block in range(8):
        part = slice(block, block + 1)
        codes = encode_scale(later[:, part], stored, choice, part)
        assert torch.equal(codes, whole[:, part])
        decoded = decode_scale(codes, stored, choice, part)
        assert torch.equal(decoded, scales(StoredScales(whole, stored.maximum, stored.offset), choice)[:, part])
    beyond = encode_scale(torch.full((6, 8), 99.0), stored, choice)
    assert beyond.unique().tolist() == [15]
    assert encode_scale(torch.zeros(6, 8), stored, choice).unique().tolist() == [0]


@pytest.mark.parametrize("scale_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("superblock", [None, 12])
def test_signs_take_the_top_bit_of_a_code(scale_bits, superblock):
    """Magnitudes are coded as on a grid without signs that has one bit less, where that width exists."""
    choice = Choice("lloyd", 3, 32, 0, scale_bits, "float32", superblock)
    sign = torch.where(torch.rand(6, 8, generator=torch.Generator().manual_seed(2)) < 0.5, -1.0, 1.0)
    wanted = _wanted()
    stored = quantize_scales(sign * wanted, choice)
    assert stored.values.dtype == torch.uint8
    assert stored.offset.item() == wanted.min().item()
    top = 2 ** (scale_bits - 1)
    assert torch.equal(stored.values >= top, sign < 0)
    assert int(stored.values.max()) < 2 * top
    found = scales(stored, choice)
    assert torch.equal(found.sign(), sign)
    alike = quantize_scales(wanted, choice)
    assert torch.equal(alike.values, stored.values % top)
    torch.testing.assert_close(found.abs(), scales(alike, choice), rtol=0, atol=0)
    if scale_bits in (3, 4):
        plain = Choice("nf", 3, 32, 0, scale_bits - 1, "float32", superblock)
        torch.testing.assert_close(found.abs(), scales(quantize_scales(wanted, plain), plain), rtol=0, atol=0)
    for block in range(8):
        part = slice(block, block + 1)
        codes = encode_scale((sign * wanted)[:, part], stored, choice, part)
        assert torch.equal(codes, stored.values[:, part])
        assert torch.equal(decode_scale(codes, stored, choice, part), found[:, part])


def test_superblocks_span_rows_in_row_major_order():
    wanted = torch.tensor([[1.0, 2.0], [5.0, 9.0], [3.0, 4.0]])
    stored = quantize_scales(wanted, Choice("nf", 4, 2, 0, scale_dtype="float32", superblock=3))
    assert stored.maximum.tolist() == [4.0, 8.0]
    assert stored.values.tolist() == [[0, 64], [255, 255], [64, 96]]


def test_bad_scales_are_refused():
    choice = Choice("nf", 4, 16, 0)
    with pytest.raises(QuantError, match=r"float32 \[rows, blocks\]"):
        quantize_scales(_wanted().double(), choice)
    with pytest.raises(NonFiniteError, match="NaN"):
        quantize_scales(_wanted() / 0, choice)
    with pytest.raises(NonFiniteError, match=r"torch\.float16"):
        quantize_scales(_wanted() * 1e6, Choice("int", 4, 16, 0, 16, "float16"))
    direct = Choice("int", 4, 16, 0, 16, "float16")
    with pytest.raises(NonFiniteError, match=r"torch\.float16"):
        encode_scale(_wanted() * 1e6, quantize_scales(_wanted(), direct), direct)
    with pytest.raises(ShapeError, match="superblocks of 5"):
        quantize_scales(_wanted(), Choice("nf", 4, 16, 0, superblock=5))
    stored = quantize_scales(_wanted(), choice)
    with pytest.raises(ShapeError, match="maxima"):
        scales(StoredScales(stored.values, stored.maximum[:3], stored.offset), choice)

import pytest
import torch

from quant import reference
from quant.exceptions import QuantError, ShapeError
from quant.pack import pack, unpack
from quant.storage import packed_columns


def _codes(rows, columns, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("bits", "columns", "words"),
    [
        (2, 16, 1),
        (2, 17, 2),
        (3, 32, 3),
        (3, 33, 6),
        (3, 1, 3),
        (4, 8, 1),
        (4, 9, 2),
        (8, 4, 1),
        (8, 5, 2),
        (8, 0, 0),
    ],
)
def test_packed_columns(bits, columns, words):
    assert packed_columns(columns, bits) == words


def test_layout_of_two_four_eight_bits_is_first_code_lowest():
    assert pack(torch.tensor([[1, 2, 3] + [0] * 13], dtype=torch.uint8), 2).tolist() == [[0b111001]]
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0xF21]]
    assert pack(torch.tensor([[1, 2, 3, 255]], dtype=torch.uint8), 8).tolist() == [[-0x100_0000 + 0x30201]]


def test_layout_of_three_bits_is_planes():
    codes = torch.zeros(1, 40, dtype=torch.uint8)
    codes[0, 0], codes[0, 9], codes[0, 31], codes[0, 32] = 1, 6, 7, 4
    assert pack(codes, 3).tolist() == [[1 - 2**31, (1 << 9) - 2**31, (1 << 9) - 2**31, 0, 0, 1]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100])
def test_equals_the_reference_and_round_trips(bits, columns):
    codes = _codes(5, columns, bits)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(words, reference.pack(codes, bits))
    back = unpack(words, bits, columns)
    assert back.dtype == torch.uint8
    assert back.is_contiguous()
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_independent(bits):
    codes = _codes(6, 72, bits)
    rows = torch.tensor([4, 0, 5])
    assert torch.equal(pack(codes, bits)[rows], pack(codes[rows], bits))
    assert torch.equal(unpack(pack(codes, bits)[2:4], bits, 72), codes[2:4])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_strided_and_misaligned_codes(bits):
    codes = _codes(1, 200, bits)
    assert torch.equal(pack(codes[:, 3:163], bits), pack(codes[:, 3:163].clone(), bits))
    tall = _codes(64, 7, bits)
    assert torch.equal(unpack(pack(tall.T, bits), bits, 64), tall.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_results_do_not_share_memory_with_the_input(bits):
    codes = _codes(2, 64, bits)
    words = pack(codes, bits)
    kept = words.clone()
    codes.fill_(0)
    unpack(words, bits, 64).fill_(0)
    assert torch.equal(words, kept)


def test_bad_requests_are_refused():
    codes = _codes(2, 8, 4)
    with pytest.raises(QuantError, match="not 5"):
        packed_columns(8, 5)
    with pytest.raises(ShapeError, match="-1 codes"):
        packed_columns(-1, 4)
    with pytest.raises(ShapeError, match="rows, columns"):
        pack(codes[0], 4)
    with pytest.raises(QuantError, match="uint8"):
        pack(codes.int(), 4)
    with pytest.raises(QuantError, match="code 4 does not fit in 2 bits"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ShapeError, match="take"):
        unpack(pack(codes, 4), 4, 9)
    with pytest.raises(QuantError, match="int32"):
        unpack(pack(codes, 4).long(), 4, 8)

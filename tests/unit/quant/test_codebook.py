import pytest
import torch

from quant.codebook import encode, normal_float
from quant.exceptions import QuantError


def _midpoints(codebook):
    return (codebook[1:] + codebook[:-1]) / 2


@pytest.mark.parametrize(
    ("bits", "levels"),
    [
        (2, [-1, 0, 0.3379152, 1]),
        (3, [-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.5626170, 1]),
    ],
)
def test_published_levels(bits, levels):
    torch.testing.assert_close(normal_float(bits), torch.tensor(levels), atol=1e-6, rtol=0)


def test_published_levels_at_eight_bits():
    codebook = normal_float(8)
    for start, levels in [
        (0, [-1, -0.9736547, -0.9494339, -0.9269785]),
        (124, [-0.0149867, -0.0099904, -0.0049950, 0, 0.0049560, 0.0099124, 0.0148696, 0.0198280]),
        (252, [0.9274868, 0.9497980, 0.9738518, 1]),
    ]:
        found = codebook[start : start + len(levels)]
        torch.testing.assert_close(found, torch.tensor(levels), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("bits", "total"), [(2, 0.3379152), (3, 0.3656914), (4, 0.3743733), (8, 0.3778580)])
def test_structure(bits, total):
    codebook = normal_float(bits)
    assert codebook.dtype == torch.float32
    assert codebook.shape == (2**bits,)
    assert bool((codebook[1:] > codebook[:-1]).all())
    assert (codebook == 0).nonzero().tolist() == [[2 ** (bits - 1) - 1]]
    assert (codebook[0].item(), codebook[-1].item()) == (-1.0, 1.0)
    assert codebook.double().sum().item() == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_unknown_width_is_refused(bits):
    with pytest.raises(QuantError, match=f"not {bits}"):
        normal_float(bits)


def test_codebook_is_the_callers_to_change():
    normal_float(4).zero_()
    assert normal_float(4)[-1] == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_ties_take_the_lower_level_and_neighbours_their_own(bits):
    codebook = normal_float(bits)
    midpoints = _midpoints(codebook)
    lower = torch.arange(2**bits - 1, dtype=torch.uint8)
    assert torch.equal(encode(midpoints, codebook), lower)
    above = torch.nextafter(midpoints, torch.tensor(2.0))
    below = torch.nextafter(midpoints, torch.tensor(-2.0))
    assert torch.equal(encode(above, codebook), lower + 1)
    assert torch.equal(encode(below, codebook), lower)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_out_of_range_clamps(bits):
    far = torch.tensor([-1.5, 1.5, float("-inf"), float("inf"), -3e38, 3e38])
    top = 2**bits - 1
    assert encode(far, normal_float(bits)).tolist() == [0, top, 0, top, 0, top]


def test_codebook_with_crowded_levels():
    # Levels this close share a cell of the look-up grid, so this takes the bisection path.
    codebook = torch.tensor([-1.0, 0.0, 1e-6, 2e-6, 1.0])
    values = torch.tensor([[-0.6, 4e-7, 6e-7], [1.4e-6, 1.6e-6, 0.9]])
    assert encode(values, codebook).tolist() == [[0, 1, 2], [2, 3, 4]]
    assert encode(_midpoints(codebook), codebook).tolist() == [0, 1, 2, 3]
    many = torch.linspace(-1.2, 1.2, 300_007)
    assert torch.equal(encode(many, codebook), torch.bucketize(many, _midpoints(codebook)).to(torch.uint8))


def test_chunks_join_and_shape_is_kept():
    # More elements than one chunk, and not a multiple of it.
    codebook = normal_float(4)
    values = torch.linspace(-1.2, 1.2, 3 * 100_003).view(3, 100_003)
    expected = torch.bucketize(values, _midpoints(codebook)).to(torch.uint8)
    assert torch.equal(encode(values, codebook), expected)
    assert torch.equal(encode(values.T, codebook), expected.T)
    assert encode(values[:0], codebook).shape == (0, 100_003)


def test_default_dtype_does_not_matter():
    torch.set_default_dtype(torch.float64)
    try:
        assert normal_float(4).dtype == torch.float32
        assert encode(torch.tensor([0.08], dtype=torch.float32), normal_float(4)).tolist() == [8]
    finally:
        torch.set_default_dtype(torch.float32)

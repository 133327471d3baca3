import pytest
import torch

from quant import reference
from quant.blockwise import quantize, rebuild
from quant.codebook import encode, levels_of, lloyd, lloyd_fit, normal_float
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.storage import SEARCHED, UNSEARCHED, Choice


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


def test_levels_of_every_grid():
    assert torch.equal(levels_of(Choice("nf", 3, 64, 0)), normal_float(3))
    assert torch.equal(levels_of(Choice("lloyd", 3, 32, 0)), lloyd(3, 32))
    assert levels_of(Choice("int", 2, 64, 0)).tolist() == [-2, -1, 0, 1]
    assert levels_of(Choice("uint", 2, 64, 0)).tolist() == [0, 1, 2, 3]
    assert {levels_of(Choice(grid, 8, 64, 0)).dtype for grid in ("nf", "lloyd", "int", "uint")} == {torch.float32}


@pytest.mark.parametrize(("bits", "block_size"), [(2, 16), (2, 64), (3, 32), (4, 16)])
def test_lloyd_levels_equal_the_reference(bits, block_size):
    """1e-4: an iteration moves the levels by less once they settle."""
    samples = 1 << 14
    expected = reference.lloyd(bits, block_size, samples // block_size, 3, 150)
    found = lloyd(bits, block_size, samples=samples, seed=3)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    # 0.02: another draw of a million values.
    torch.testing.assert_close(lloyd(bits, block_size).double(), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(("bits", "block_size"), [(2, 1), (8, 1), (4, 3), (8, 64), (3, 5000)])
def test_lloyd_levels_increase_inside_the_unit_range_at_any_size(bits, block_size):
    found = lloyd(bits, block_size, samples=1 << 14)
    assert found.shape == (2**bits,)
    assert bool((found.diff() > 0).all())
    assert found[0] >= -1
    assert found[2 ** (bits - 1) - 1] == 0
    assert found[-1] == 1


def test_lloyd_depends_on_its_seed_alone():
    assert not torch.equal(lloyd(4, 32, samples=4096, seed=1), lloyd(4, 32, samples=4096))
    torch.manual_seed(5)
    first = lloyd(4, 32, samples=4097)
    torch.manual_seed(6)
    assert torch.equal(lloyd(4, 32, samples=4097), first)


def test_lloyd_refuses_what_has_no_codebook():
    with pytest.raises(QuantError, match="not 5"):
        lloyd(5, 64)
    with pytest.raises(QuantError, match="block_size"):
        lloyd(4, 0)


def test_lloyd_fit_equals_the_reference_once_settled():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(20, 15, generator=generator), torch.rand(20, 15, generator=generator)
    init = normal_float(3)
    found = lloyd_fit(values, weights, init)
    expected = reference.lloyd_fit(values.flatten(), weights.flatten(), init, 200)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert not torch.equal(found, lloyd_fit(values, None, init))
    alike = lloyd_fit(values, torch.full_like(values, 0.25), init)
    torch.testing.assert_close(lloyd_fit(values, None, init), alike, atol=1e-6, rtol=0)


def test_lloyd_fit_finds_the_values_there_are():
    values = torch.tensor([-0.75, -0.75, 0.125, 0.5, 0.5])
    assert lloyd_fit(values, None, torch.tensor([-1.0, 0.0, 0.9])).tolist() == [-0.75, 0.125, 0.5]
    # Without a value of its own a level stays.
    assert lloyd_fit(values, None, torch.tensor([-0.5, 0.4, 3.0])).tolist() == [-0.75, 0.375, 3.0]
    assert lloyd_fit(values, torch.zeros(5), torch.tensor([-0.5, 0.4])).tolist() == pytest.approx([-0.5, 0.4])


def test_lloyd_fit_keeps_levels_apart_that_fp32_would_join():
    init = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) * 1e-12 + 0.3
    assert bool((lloyd_fit(torch.tensor([5.0]), None, init).diff() > 0).all())


def test_lloyd_fit_refuses_bad_input():
    values, init = torch.rand(8), torch.tensor([0.2, 0.8])
    with pytest.raises(ShapeError, match="do not fit"):
        lloyd_fit(values, torch.ones(7), init)
    with pytest.raises(ShapeError, match="init"):
        lloyd_fit(values, None, init[None])
    with pytest.raises(QuantError, match="increase"):
        lloyd_fit(values, None, init.flip(0))
    with pytest.raises(QuantError, match="negative"):
        lloyd_fit(values, -torch.ones(8), init)
    with pytest.raises(NonFiniteError, match="values"):
        lloyd_fit(values / 0, None, init)


@pytest.mark.parametrize(("bits", "block_size", "gain"), [(2, 64, 0.13), (2, 192, 0.15), (3, 64, 0.08)])
def test_levels_fitted_with_the_search_of_scales_leave_less_error(bits, block_size, gain):
    """On fresh Gaussian draws, against levels for the largest weight as the scale; the search alone is worth less."""
    choice = Choice("lloyd", bits, block_size, 0, 32, "float32")
    weight = torch.randn(2048, 384, generator=torch.Generator().manual_seed(7))

    def error(levels: torch.Tensor, multiples: tuple[float, ...]) -> float:
        return float((rebuild(quantize(weight, choice, levels, multiples), choice) - weight).square().mean())

    plain, fitted = lloyd(bits, block_size), lloyd(bits, block_size, SEARCHED)
    assert error(fitted, SEARCHED) < (1 - gain) * error(plain, UNSEARCHED)
    assert error(fitted, SEARCHED) < error(plain, SEARCHED) < error(plain, UNSEARCHED)
    assert fitted[2 ** (bits - 1) - 1] == 0
    assert fitted[-1] == 1
    assert bool((fitted.diff() > 0).all())

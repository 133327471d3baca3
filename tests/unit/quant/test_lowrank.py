import pytest
import torch

from quant import reference
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.lowrank import dequantize_factors, quantize_factors, store_factors, svd_lowrank


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _matrix(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=_generator(seed), dtype=dtype)


@pytest.mark.parametrize(("rank", "exact"), [(4, True), (4, False), (12, False)])
def test_shapes_and_dtype(rank, exact):
    for dtype in (torch.float32, torch.float64):
        left, right = svd_lowrank(_matrix(40, 24, dtype=dtype), rank, generator=_generator(), exact=exact)
        assert (left.shape, right.shape) == ((40, rank), (rank, 24))
        assert left.dtype == right.dtype == dtype


def test_exact_is_the_truncated_svd_split_evenly():
    matrix = _matrix(30, 50, dtype=torch.float64)
    left, right = svd_lowrank(matrix, 5, generator=_generator(), exact=True)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :5] * s[:5]) @ vh[:5], atol=1e-12, rtol=0)
    torch.testing.assert_close(left.T @ left, torch.diag(s[:5]), atol=1e-12, rtol=0)
    torch.testing.assert_close(right @ right.T, torch.diag(s[:5]), atol=1e-12, rtol=0)


def test_high_rank_uses_the_full_svd():
    # No randomness: two generators, one result. Below the threshold the probe shows.
    matrix = _matrix(32, 48)
    one, two = (svd_lowrank(matrix, 16, generator=_generator(seed)) for seed in (1, 2))
    assert torch.equal(one[0], two[0])
    one, two = (svd_lowrank(matrix, 15, generator=_generator(seed), oversampling=0) for seed in (1, 2))
    assert not torch.equal(one[0], two[0])


def test_randomised_recovers_a_low_rank_matrix():
    matrix = _matrix(60, 6, dtype=torch.float64) @ _matrix(6, 90, seed=1, dtype=torch.float64)
    left, right = svd_lowrank(matrix, 6, generator=_generator())
    torch.testing.assert_close(left @ right, matrix, atol=1e-10, rtol=0)


def test_power_iterations_help_on_a_flat_spectrum():
    matrix = _matrix(200, 300)

    def error(iterations):
        left, right = svd_lowrank(matrix, 8, generator=_generator(), oversampling=2, iterations=iterations)
        return (matrix - left @ right).norm().item()

    assert error(4) < error(0)


def test_directions_are_sorted_so_a_smaller_rank_is_a_slice():
    matrix = _matrix(40, 60)
    left, right = svd_lowrank(matrix, 12, generator=_generator(), exact=True)
    smaller = svd_lowrank(matrix, 3, generator=_generator(), exact=True)
    torch.testing.assert_close(left[:, :3] @ right[:3], smaller[0] @ smaller[1], atol=1e-5, rtol=0)


def test_same_seed_same_bits():
    matrix = _matrix(64, 80)
    one, two = (svd_lowrank(matrix, 8, generator=_generator(3)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_weighted_fit_equals_the_reference():
    matrix = _matrix(40, 24)
    rows, columns = (
        torch.rand(40, generator=_generator(1)) + 0.1,
        torch.rand(24, generator=_generator(2)) + 0.1,
    )
    left, right = svd_lowrank(matrix, 5, generator=_generator(), row_weight=rows, column_weight=columns, exact=True)
    expected = reference.weighted_lowrank(matrix, 5, rows, columns)
    torch.testing.assert_close((left @ right).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["row_weight", "column_weight"])
def test_one_sided_weights(side):
    matrix = _matrix(24, 24)
    weight = torch.rand(24, generator=_generator(1)) + 0.1
    ones = torch.ones(24)
    left, right = svd_lowrank(matrix, 5, generator=_generator(), exact=True, **{side: weight})
    rows, columns = (weight, ones) if side == "row_weight" else (ones, weight)
    expected = reference.weighted_lowrank(matrix, 5, rows, columns)
    torch.testing.assert_close((left @ right).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_dead_rows_and_columns_stay_finite(exact):
    rows, columns = torch.ones(64), torch.ones(80)
    rows[[0, 7]] = 0
    columns[5] = 0
    factors = svd_lowrank(
        _matrix(64, 80), 6, generator=_generator(), row_weight=rows, column_weight=columns, exact=exact
    )
    assert all(bool(torch.isfinite(factor).all()) for factor in factors)
    assert all(factor.abs().max() < 1e3 for factor in factors)


def test_all_zero_weight_is_no_weight():
    matrix = _matrix(20, 20)
    weighted = svd_lowrank(matrix, 4, generator=_generator(), row_weight=torch.zeros(20), exact=True)
    plain = svd_lowrank(matrix, 4, generator=_generator(), exact=True)
    assert torch.equal(weighted[0], plain[0])


def test_rank_zero_is_empty():
    left, right = svd_lowrank(_matrix(6, 9), 0, generator=_generator())
    assert (left.shape, right.shape) == ((6, 0), (0, 9))


def test_zero_matrix():
    left, right = svd_lowrank(torch.zeros(64, 64), 4, generator=_generator())
    assert not (left @ right).any()


def test_input_is_left_alone():
    matrix, weight = _matrix(20, 30), torch.rand(20)
    before = matrix.clone(), weight.clone()
    svd_lowrank(matrix, 4, generator=_generator(), row_weight=weight)
    assert torch.equal(matrix, before[0])
    assert torch.equal(weight, before[1])


def test_bad_requests_are_refused():
    matrix, generator = _matrix(6, 9), _generator()
    for rank in (7, -1):
        with pytest.raises(ShapeError, match="rank"):
            svd_lowrank(matrix, rank, generator=generator)
    with pytest.raises(ShapeError, match="non-empty"):
        svd_lowrank(matrix[:0], 0, generator=generator)
    with pytest.raises(QuantError, match="float32"):
        svd_lowrank(matrix.half(), 2, generator=generator)
    with pytest.raises(ShapeError, match="column weight"):
        svd_lowrank(matrix, 2, generator=generator, column_weight=torch.ones(6))
    with pytest.raises(QuantError, match="negative"):
        svd_lowrank(matrix, 2, generator=generator, row_weight=-torch.ones(6))
    with pytest.raises(NonFiniteError, match="row weight"):
        svd_lowrank(matrix, 2, generator=generator, row_weight=torch.full((6,), float("inf")))
    for bad in (float("nan"), float("-inf")):
        broken = matrix.clone()
        broken[2, 2] = bad
        with pytest.raises(NonFiniteError, match="matrix"):
            svd_lowrank(broken, 2, generator=generator)


def test_int8_factors_are_the_nearest_on_their_components_own_grid():
    left, right = _matrix(40, 5) * torch.tensor([1e-3, 1.0, 50.0, 1.0, 1e4]), _matrix(5, 24, seed=1)
    found = quantize_factors(left, right)
    assert [tensor.dtype for tensor in found] == [torch.int8, torch.int8, torch.float32]
    codes_left, codes_right, scale = found
    assert codes_left.abs().amax(dim=0).tolist() == codes_right.abs().amax(dim=1).tolist() == [127] * 5
    steps = left.abs().amax(dim=0).double() / 127, right.abs().amax(dim=1).double() / 127
    torch.testing.assert_close(scale.double(), steps[0] * steps[1], rtol=1e-7, atol=0)
    assert bool(((codes_left * steps[0] - left).abs() <= 0.5000001 * steps[0]).all())
    assert bool(((codes_right * steps[1][:, None] - right).abs() <= 0.5000001 * steps[1][:, None]).all())
    one, two = dequantize_factors(*found)
    product = sum(scale[k] * torch.outer(codes_left[:, k].float(), codes_right[k].float()) for k in range(5))
    torch.testing.assert_close(one @ two, product, rtol=1e-5, atol=1e-5 * float(product.abs().max()))


def test_int8_factors_of_representable_components_lose_nothing():
    generator = _generator(3)
    left = torch.randint(-127, 128, (30, 4), generator=generator).float()
    right = torch.randint(-127, 128, (4, 20), generator=generator).float()
    left[0], right[:, 0] = 127, -127
    one, two = dequantize_factors(*quantize_factors(left * 0.25, right * 8))
    torch.testing.assert_close(one @ two, 2 * left @ right, rtol=1e-6, atol=0.1)
    assert torch.equal(quantize_factors(left * 0.25, right * 8)[0].float(), left)


@pytest.mark.parametrize("tiny", [0.0, 1e-40])
def test_int8_components_too_small_for_their_scale_are_zero(tiny):
    left, right = _matrix(6, 2), _matrix(2, 6, seed=1)
    left[:, 1] *= tiny
    right[1] *= tiny
    codes_left, codes_right, scale = quantize_factors(left, right)
    assert scale[1] == 0
    assert not codes_left[:, 1].any()
    assert not codes_right[1].any()
    assert bool(torch.isfinite(torch.matmul(*dequantize_factors(codes_left, codes_right, scale))).all())


def test_factors_as_stored():
    left, right = _matrix(6, 2), _matrix(2, 6, seed=1)
    one, two, scale = store_factors(left, right, "bfloat16")
    assert (one.dtype, two.dtype, scale) == (torch.bfloat16, torch.bfloat16, None)
    assert torch.equal(dequantize_factors(one, two, None)[0], left.bfloat16().float())
    assert store_factors(left, right, "int8")[2].shape == (2,)
    assert [tuple(part.shape) for part in store_factors(left[:, :0], right[:0], "int8")] == [(6, 0), (0, 6), (0,)]
    with pytest.raises(NonFiniteError, match="NaN"):
        quantize_factors(left / 0, right)
    with pytest.raises(NonFiniteError, match="float32 scale"):
        quantize_factors(left * 1e25, right * 1e25)

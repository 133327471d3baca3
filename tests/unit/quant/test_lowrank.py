import pytest
import torch

from quant import reference
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.lowrank import svd_lowrank


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

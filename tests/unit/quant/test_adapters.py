"""Algebra on factors, against the dense product in float64."""

import math

import pytest
import torch

from quant.adapters import (
    find_intruders,
    inner_product,
    left_vectors,
    product_norm,
    product_svd,
    rank_of_energy,
    subspace_overlap,
    subspaces,
    truncated,
)
from quant.exceptions import NonFiniteError, QuantError, ShapeError


def factors(rows, columns, rank, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype)


# Wide, tall, and of more rank than a side, or than both.
SIDES = [(40, 24, 6), (24, 40, 6), (5, 30, 8), (30, 5, 8), (4, 6, 9)]


@pytest.mark.parametrize("sides", SIDES)
def test_the_svd_is_that_of_the_dense_product(sides):
    left, right = factors(*sides)
    u, values, vh = product_svd(left, right)
    count = min(sides)
    assert (u.shape, values.shape, vh.shape) == ((sides[0], count), (count,), (count, sides[1]))
    torch.testing.assert_close(u * values @ vh, left @ right, atol=1e-12, rtol=0)
    torch.testing.assert_close(values, torch.linalg.svdvals(left @ right)[:count], atol=1e-12, rtol=0)
    for basis in (u, vh.T):
        torch.testing.assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("rank", [1, 3])
def test_truncation_is_the_truncated_dense_svd(sides, rank):
    left, right = factors(*sides)
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    one, two = truncated(left, right, rank)
    torch.testing.assert_close(one @ two, u[:, :rank] * s[:rank] @ vh[:rank], atol=1e-11, rtol=0)
    torch.testing.assert_close(one.norm(dim=0), two.norm(dim=1), atol=1e-12, rtol=0)


def test_half_precision_factors_are_taken_as_they_are():
    left, right = factors(20, 30, 4, dtype=torch.bfloat16)
    one, two = truncated(left, right, 4)
    assert one.dtype == torch.float64
    torch.testing.assert_close(one @ two, left.double() @ right.double(), atol=1e-12, rtol=0)


def test_norms_and_inner_products_are_those_of_the_dense_products():
    one, two = factors(20, 30, 4), factors(20, 30, 7, seed=1)
    dense = [left @ right for left, right in (one, two)]
    assert product_norm(*one) == pytest.approx(float(dense[0].norm()), rel=1e-13)
    assert inner_product(one, two) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-12)


def test_a_difference_that_nearly_cancels_has_its_norm():
    left, right = factors(20, 30, 4)
    moved = left + 1e-12 * factors(20, 4, 4, seed=1)[0]
    found = product_norm(torch.cat([moved, -left], dim=1), torch.cat([right, right]))
    assert found == pytest.approx(float(((moved - left) @ right).norm()), rel=1e-2)


@pytest.mark.parametrize(
    ("energy", "rank"), [(1.0, 4), (0.99, 3), (0.9, 2), (0.8889, 2), (0.8888, 1), (0.5, 1), (1e-9, 1)]
)
def test_the_smallest_rank_that_keeps_the_energy(energy, rank):
    # Shares of the sum: 0.88889, 0.98889, 0.99889, 1.
    values = torch.tensor([8, 0.9, 0.09, 0.01], dtype=torch.float64).sqrt()
    assert rank_of_energy(values, energy) == rank


def test_rounding_has_no_energy():
    left, right = factors(30, 40, 3)
    doubled = torch.cat([left, 2 * left], dim=1), torch.cat([right, right])
    assert rank_of_energy(product_svd(*doubled)[1], 1.0) == 3
    assert rank_of_energy(torch.zeros(5), 0.9) == 1


def test_overlap_counts_shared_directions():
    left, right = factors(40, 30, 4)
    other = factors(40, 30, 6, seed=1)
    whole = subspaces(left, right)
    assert [basis.shape for basis in whole] == [(40, 4), (30, 4)]
    # The same two columns written to, elsewhere read from.
    part = subspaces(left[:, :2], other[1][:2])
    assert subspace_overlap(whole[0], part[0]) == pytest.approx(1, abs=1e-12)
    assert subspace_overlap(whole[1], part[1]) < 0.5
    angles = torch.linalg.svdvals(whole[0].T @ subspaces(*other)[0])
    assert subspace_overlap(whole[0], subspaces(*other)[0]) == pytest.approx(float(angles.square().mean()), rel=1e-12)
    one, two = torch.eye(8)[:, :3], torch.eye(8)[:, 2:6]
    assert subspace_overlap(one, two) == pytest.approx(1 / 3)


def test_random_subspaces_overlap_by_chance_alone():
    overlaps = [subspace_overlap(*(subspaces(*factors(60, 50, r, seed=s + r))[0] for r in (3, 9))) for s in range(200)]
    assert sum(overlaps) / 200 == pytest.approx(9 / 60, rel=0.05)


def test_an_update_of_zero_has_no_subspace():
    left, right = factors(20, 30, 2)
    empty = subspaces(0 * left, right)
    assert [basis.shape for basis in empty] == [(20, 0), (30, 0)]
    assert subspace_overlap(empty[0], subspaces(left, right)[0]) is None


def dense_intruders(weight, update, top, threshold):
    """Vector by vector, in float64."""
    before, _, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    after, values, _ = torch.linalg.svd(weight.double() + update.double(), full_matrices=False)
    cosines = [max(abs(float(before[:, i] @ after[:, j])) for i in range(before.shape[1])) for j in range(top)]
    new = [j for j in range(top) if cosines[j] < threshold]
    energy = math.fsum(float(values[j]) ** 2 for j in new) / math.fsum(float(values[j]) ** 2 for j in range(top))
    return cosines, len(new), energy, float(values[0])


@pytest.mark.parametrize("sides", [(96, 64), (64, 96)])
def test_intruders_equal_the_reference(sides):
    weight = factors(*sides, min(sides))[0] @ factors(*sides, min(sides))[1] / 8
    update = torch.matmul(*factors(*sides, 3, seed=1))
    found = find_intruders(left_vectors(weight)[0], weight + update, top=6, threshold=0.4)
    cosines, count, energy, largest = dense_intruders(weight, update, 6, 0.4)
    assert found.cosines == pytest.approx(cosines, abs=1e-10)
    assert 0 < count < 6
    assert (found.count, found.energy, found.largest) == pytest.approx((count, energy, largest), rel=1e-10)


def spectrum(seed=0):
    """A float32 weight [128, 160] with a falling spectrum, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(128, 160, generator=generator), full_matrices=False)
    return u * torch.linspace(10, 0.1, 128) @ vh, u, vh


def test_a_planted_direction_is_found_and_a_vector_of_the_base_is_not():
    weight, u, vh = spectrum()
    before = left_vectors(weight)[0]
    # A cosine of 0.25 with each of 16 vectors.
    spread = u[:, 20:36].sum(dim=1, keepdim=True) / 4
    found = find_intruders(before, weight + 40 * spread @ vh[60:61])
    assert found.count == 1
    assert found.cosines[0] == pytest.approx(0.25, abs=0.03)
    assert found.energy == pytest.approx(
        1600 / (1600 + 100 * sum((1 - 0.99 * i / 127) ** 2 for i in range(9))), rel=0.05
    )
    assert find_intruders(before, weight + 40 * u[:, 50:51] @ vh[50:51]).count == 0


@pytest.mark.parametrize("size", [0.0, 1e-4])
def test_an_update_of_next_to_nothing_has_no_intruders(size):
    weight, _, _ = spectrum()
    left, right = factors(128, 160, 4, dtype=torch.float32)
    found = find_intruders(left_vectors(weight)[0], weight + size * left @ right)
    assert (found.count, found.energy) == (0, 0)
    assert min(found.cosines) > 0.9


def test_a_weight_of_zero_has_no_energy_to_share():
    found = find_intruders(torch.eye(4), torch.zeros(4, 3))
    assert (len(found.cosines), found.energy, found.largest) == (3, 0, 0)


def test_what_cannot_be_is_refused():
    left, right = factors(6, 9, 2)
    for call in (product_svd, product_norm, subspaces, lambda *pair: truncated(*pair, 1)):
        with pytest.raises(ShapeError, match=r"expected factors \[out, rank\]"):
            call(left, right[:1])
        with pytest.raises(ShapeError, match="expected factors"):
            call(left[:, :0], right[:0])
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            call(left / 0, right)
    with pytest.raises(ShapeError, match="at least 1, found 0"):
        truncated(left, right, 0)
    with pytest.raises(ShapeError, match="6 x 9 and 9 x 6"):
        inner_product((left, right), (right.T, left.T))
    for energy in (0.0, 1.1, -1, float("nan")):
        with pytest.raises(QuantError, match="energy must be above 0"):
            rank_of_energy(torch.ones(2), energy)
    with pytest.raises(ShapeError, match="non-empty matrix"):
        left_vectors(left[:0])
    with pytest.raises(QuantError, match="float32 or float64"):
        left_vectors(left.half())
    with pytest.raises(NonFiniteError, match="weight holds NaN"):
        left_vectors(left * float("nan"))
    for before, top in ((torch.eye(5), 3), (torch.eye(6), 0), (torch.ones(6), 3)):
        with pytest.raises(ShapeError, match="vectors of 6 entries"):
            find_intruders(before, left, top=top)

import pytest
import torch
from torch import Tensor

from prune.correction import LIMIT, correct_adapter, within_limit
from prune.exceptions import PruneError

OUT, IN, RANK, STRENGTH = 7, 12, 4, 2.0


def drawn(seed: int, size: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, and what the weight changes by, of that size beside B."""
    generator = torch.Generator().manual_seed(seed)
    a, b, difference = (torch.randn(shape, generator=generator) for shape in ((RANK, IN), (OUT, RANK), (OUT, IN)))
    return a, b, size * difference


def twin(a: Tensor, b: Tensor, difference: Tensor, limit: float) -> Tensor:
    """The published form, in fp64: B U S corrected direction by direction for V', then brought back to A by its
    pseudo-inverse."""
    directions, sizes, inputs = torch.linalg.svd(a.double(), full_matrices=False)
    rotated = b.double() @ directions @ torch.diag(sizes)
    for j in range(len(sizes)):
        correction = difference.double() @ inputs[j] / STRENGTH
        size, allowed = correction.abs().mean(), limit * rotated[:, j].abs().mean()
        rotated[:, j] -= correction * min(1.0, float(allowed / size))
    return rotated @ inputs @ torch.linalg.pinv(a.double())


@pytest.mark.parametrize("size", [0.1, 30.0, 1000.0])
def test_equals_the_published_form(size: float) -> None:
    """fp32 factors: 1e-5 of the largest entry. Corrections are small, of the size of the limit, and far beyond."""
    a, b, difference = drawn(0, size)
    found, expected = correct_adapter(a, b, difference, STRENGTH), twin(a, b, difference, LIMIT)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    limited = not torch.allclose(found, correct_adapter(a, b, difference, STRENGTH, float("inf")), rtol=1e-3)
    assert limited == (size > 1)


def test_unlimited_it_is_exact_for_inputs_that_a_tells_apart() -> None:
    a, b, difference = drawn(1, 50.0)
    a, b, difference = a.double(), b.double(), difference.double()
    found = correct_adapter(a, b, difference, STRENGTH, float("inf")).double()
    x = a.T @ torch.randn(RANK, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    trained, corrected = STRENGTH * b @ (a @ x), difference @ x + STRENGTH * found @ (a @ x)
    torch.testing.assert_close(corrected, trained, rtol=0, atol=1e-5 * float((difference @ x).abs().max()))
    torch.testing.assert_close(found, b - difference @ torch.linalg.pinv(a) / STRENGTH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [0.5, 3.0])
def test_no_direction_is_corrected_by_more_than_the_limit(limit: float) -> None:
    a, b, difference = drawn(3, 30.0)
    found = correct_adapter(a, b, difference, STRENGTH, limit)
    directions = torch.linalg.svd(a.double(), full_matrices=False)[0]
    moved = ((found - b).double() @ directions).abs().mean(dim=0) / (b.double() @ directions).abs().mean(dim=0)
    assert bool((moved <= limit * (1 + 1e-5)).all())
    assert float(moved.max()) > limit * (1 - 1e-5)
    assert within_limit(a, b, found, limit)
    assert not within_limit(a, b, found, 0.99 * limit)


def test_no_difference_is_no_correction() -> None:
    a, b, difference = drawn(4, 0.0)
    assert torch.equal(correct_adapter(a, b, difference, STRENGTH), b)


def test_what_a_does_not_see_is_left_alone() -> None:
    """Two equal rows of A: the direction between them is rounding, and dividing by it would be noise."""
    a, b, difference = drawn(5, 1.0)
    a[3] = a[2]
    found = correct_adapter(a, b, difference, STRENGTH)
    between = torch.tensor([0.0, 0.0, 1.0, -1.0])
    torch.testing.assert_close(found @ between, b @ between, rtol=1e-5, atol=1e-5)
    assert torch.equal(correct_adapter(torch.zeros_like(a), b, difference, STRENGTH), b)


def test_shapes_that_disagree() -> None:
    a, b, difference = drawn(6, 1.0)
    for wrong in ((a, b, difference.T), (a[:2], b, difference), (a[0], b, difference)):
        with pytest.raises(PruneError, match=r"expected a difference \[out, in\] and factors"):
            correct_adapter(*wrong, STRENGTH)

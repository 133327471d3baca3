"""Tolerances: hand arithmetic is exact; float64 identities 1e-12 relative; fp32 against fp64 1e-5 relative."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prune.exceptions import PruneError
from prune.groups import ROLES, LayerShape, pruned_dim, shape_of
from prune.lora_guided import Adapter, averaged, guided, guided_sums, side_matched
from prune.taylor import taylor

SHAPE = LayerShape(hidden=12, heads=4, kv_heads=2, head_dim=3, ffn=10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def estimate(adapter: Adapter, eta: float = 0.0) -> Tensor:
    """Ghat, term by term."""
    return adapter.grad_b @ adapter.a + adapter.b @ adapter.grad_a - eta * (adapter.grad_b @ adapter.grad_a)


def problem(
    out: int, fan_in: int, rank: int, *, scaling: float = 2.0, loss_scale: float = 1.0, zero_b: bool = False
) -> tuple[Adapter, Tensor, Tensor]:
    """An adapter with its autograd gradients, the frozen weight, and the gradient of the whole weight, in float64."""
    drawn = generator(out * 1000 + fan_in * 10 + rank)
    x, weight, a, b = (
        torch.randn(*size, generator=drawn, dtype=torch.float64)
        for size in ((9, fan_in), (out, fan_in), (rank, fan_in), (out, rank))
    )
    b = b * (0.0 if zero_b else 0.3)
    for leaf in (weight, a, b):
        leaf.requires_grad_()
    y = x @ (weight + scaling * b @ a).T
    (loss_scale * torch.tanh(y).square().sum()).backward()
    made = Adapter(a.detach(), b.detach(), a.grad, b.grad, scaling)
    return made, weight.detach(), weight.grad


def by_hand(gradient: Tensor, a: Tensor, b: Tensor, scaling: float) -> Adapter:
    """The adapter whose gradients follow from a given gradient of the weight."""
    return Adapter(a, b, scaling * b.T @ gradient, scaling * gradient @ a.T, scaling)


@pytest.mark.parametrize(
    ("eta", "power", "rows", "columns"),
    [
        (0.0, 1, [36, 2], [2, 36]),
        (0.0, 2, [1296, 4], [4, 1296]),
        (1.0, 1, [24, 2], [14, 12]),
        (1.0, 2, [288, 4], [148, 144]),
    ],
)
def test_vector(eta: float, power: int, rows: list[float], columns: list[float]) -> None:
    gradient = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    adapter = by_hand(gradient, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [-1.0]]), 2.0)
    assert adapter.grad_a.tolist() == [[-2, 2]]
    assert adapter.grad_b.tolist() == [[2], [0]]
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert guided_sums(adapter, weight, 0, eta=eta, power=power).tolist() == rows
    assert guided_sums(adapter, weight, 1, eta=eta, power=power).tolist() == columns


def test_the_estimate_is_the_gradient_through_two_projections() -> None:
    adapter, weight, gradient = problem(7, 11, 3)
    a, b, s = adapter.a, adapter.b, adapter.scaling
    seen = s * (gradient @ a.T @ a + b @ b.T @ gradient)
    torch.testing.assert_close(estimate(adapter), seen, rtol=1e-12, atol=1e-12)
    later = seen - s**2 * gradient @ a.T @ b.T @ gradient
    effective = weight + s * b @ a
    for dim in (0, 1):
        expected = (seen * effective).abs().sum(dim=1 - dim)
        torch.testing.assert_close(guided_sums(adapter, weight, dim), expected, rtol=1e-12, atol=0)
        expected = (later * effective).square().sum(dim=1 - dim)
        torch.testing.assert_close(guided_sums(adapter, weight, dim, eta=1.0, power=2), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("role", ROLES)
def test_zero_b_and_square_orthonormal_a_give_the_taylor_score(role: str, eta: float) -> None:
    out, fan_in = shape_of(role, SHAPE)
    _, weight, gradient = problem(out, fan_in, 1, zero_b=True)
    a, _ = torch.linalg.qr(torch.randn(fan_in, fan_in, generator=generator(), dtype=torch.float64))
    adapter = by_hand(gradient, a, torch.zeros(out, fan_in, dtype=torch.float64), 2.0)
    for power in (1, 2):
        found = guided(role, adapter, weight, SHAPE, eta=eta, power=power)
        expected = taylor(role, weight, 2.0 * gradient, SHAPE, power=power)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_multiple_of_the_loss_ranks_alike_without_the_eta_term() -> None:
    plain, weight, _ = problem(7, 11, 3)
    scaled, _, _ = problem(7, 11, 3, loss_scale=1024.0)
    for dim in (0, 1):
        before, after = guided_sums(plain, weight, dim), guided_sums(scaled, weight, dim)
        torch.testing.assert_close(after, 1024 * before, rtol=1e-12, atol=0)
        assert torch.equal(before.argsort(), after.argsort())


def test_a_multiple_of_the_loss_can_rank_otherwise_with_the_eta_term() -> None:
    # Row 0: |2 - eta c| per unit of loss scale c, row 1: |1 - 0|.
    a, b, weight = torch.tensor([[1.0]]), torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    gradient = torch.tensor([[1.0], [1.5]])
    small, large = (guided_sums(by_hand(c * gradient, a, b, 1.0), weight, 0, eta=1.0) for c in (0.1, 1.9))
    assert small[0] > small[1]
    assert large[0] < large[1]


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *found, 0)
        return result


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_of_rows_give_what_the_dense_matrix_gives(dim: int) -> None:
    adapter, weight, _ = problem(600, 40, 3)
    dense = (estimate(adapter, eta=0.5) * (weight + adapter.scaling * adapter.b @ adapter.a)).abs().sum(dim=1 - dim)
    found = guided_sums(adapter, weight, dim, eta=0.5)
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=0)

    asked = []

    def rows(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return weight[start:stop].clone()

    with Largest() as largest:
        assert torch.equal(guided_sums(adapter, rows, dim, eta=0.5), found)
    assert asked == [(0, 256), (256, 512), (512, 600)]
    assert largest.elements == 256 * 40


def test_narrow_factors_are_widened_and_nothing_is_changed() -> None:
    adapter, weight, _ = problem(9, 8, 2)
    parts = [part.bfloat16() for part in (adapter.a, adapter.b, adapter.grad_a, adapter.grad_b)]
    copies = [part.clone() for part in parts]
    narrow = Adapter(*parts, adapter.scaling)
    wide = Adapter(*(part.double() for part in parts), adapter.scaling)
    weight = weight.bfloat16()
    kept = weight.clone()
    found = guided_sums(narrow, weight, 0, eta=1.0)
    # fp32 products of bf16 factors; a product rounded to bf16 would be off by 1e-3.
    torch.testing.assert_close(found, guided_sums(wide, weight.double(), 0, eta=1.0), rtol=1e-5, atol=0)
    assert all(map(torch.equal, parts, copies))
    assert torch.equal(weight, kept)
    # fp32 gradients of bf16 factors.
    mixed = Adapter(parts[0], parts[1], parts[2].float(), parts[3].float(), adapter.scaling)
    assert torch.equal(guided_sums(mixed, weight, 0, eta=1.0), found)


def test_parameters_may_require_gradients() -> None:
    adapter, weight, _ = problem(4, 5, 2)
    trained = Adapter(
        adapter.a.requires_grad_(), adapter.b.requires_grad_(), adapter.grad_a, adapter.grad_b, adapter.scaling
    )
    assert not guided_sums(trained, weight, 0).requires_grad


def test_groups_add_up_their_channels() -> None:
    for role in ROLES:
        adapter, weight, _ = problem(*shape_of(role, SHAPE), 2)
        sums = guided_sums(adapter, weight, pruned_dim(role), eta=0.5, power=2)
        found = guided(role, adapter, weight, SHAPE, eta=0.5, power=2)
        expected = torch.stack([part.sum() for part in sums.chunk(len(found))])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert len(found) == (SHAPE.kv_heads if role in "qkvo" else SHAPE.ffn)


@pytest.mark.parametrize("role", ROLES)
def test_side_matched_factors_leave_the_model_and_see_the_gradient(role: str) -> None:
    out, fan_in = shape_of(role, SHAPE)
    a, b = side_matched(role, SHAPE, 40_000, generator())
    assert (a.shape, b.shape) == ((40_000, fan_in), (out, 40_000))
    assert bool((b if pruned_dim(role) == 0 else a).eq(0).all())
    gradient = torch.randn(out, fan_in, generator=generator(1))
    adapter = by_hand(gradient, a, b, 3.0)
    # Each entry of A^T A is off by about rank^-1/2 = 0.005, and an entry of Ghat sums 12 of them.
    torch.testing.assert_close(estimate(adapter) / 3, gradient, rtol=0, atol=0.1)
    again = side_matched(role, SHAPE, 40_000, generator())
    assert torch.equal(again[0], a)
    assert torch.equal(again[1], b)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_averaged_adapter_has_the_mean_of_signed_estimates(eta: float) -> None:
    _, weight, gradient = problem(7, 11, 1)
    drawn = generator(5)
    several = [
        by_hand(
            gradient, torch.randn(r, 11, generator=drawn).double(), torch.randn(7, r, generator=drawn).double(), 2.0
        )
        for r in (1, 2, 3)
    ]
    one = averaged(several)
    mean = sum(estimate(adapter, eta) for adapter in several) / 3
    added = 2.0 * sum(adapter.b @ adapter.a for adapter in several) / 3
    torch.testing.assert_close(estimate(one, eta), mean, rtol=1e-12, atol=1e-12)
    for dim in (0, 1):
        expected = (mean * (weight + added)).abs().sum(dim=1 - dim)
        torch.testing.assert_close(guided_sums(one, weight, dim, eta=eta), expected, rtol=1e-12, atol=0)
        # Averaging after the absolute value is another score.
        after = sum(guided_sums(adapter, weight, dim, eta=eta) for adapter in several) / 3
        assert not torch.allclose(after, expected, rtol=0.05)


def test_bad_input_is_refused() -> None:
    a, b = torch.zeros(2, 5), torch.zeros(4, 2)
    adapter = Adapter(a, b, a, b, 1.0)
    wider, flat = torch.zeros(4, 3), torch.zeros(2)
    for parts in ((a, b.T, a, b.T), (a, b, a, b[:3]), (a, wider, a, wider), (flat, b, flat, b)):
        with pytest.raises(PruneError, match=r"expected A \[r, in\], B \[out, r\] and gradients"):
            Adapter(*parts, 1.0)
    with pytest.raises(PruneError, match="expected a finite scaling, found inf"):
        Adapter(a, b, a, b, float("inf"))
    with pytest.raises(PruneError, match=r"expected a weight \(4, 5\), found \(5, 4\)"):
        guided_sums(adapter, torch.zeros(5, 4), 0)
    with pytest.raises(PruneError, match=r"rows 0 to 4 must have shape \(4, 5\), found \(4, 4\)"):
        guided_sums(adapter, lambda start, stop: torch.zeros(stop - start, 4), 0)
    with pytest.raises(PruneError, match="found the power 3"):
        guided_sums(adapter, torch.zeros(4, 5), 0, power=3)
    with pytest.raises(PruneError, match="axes 0 and 1, found -1"):
        guided_sums(adapter, torch.zeros(4, 5), -1)
    with pytest.raises(PruneError, match="expected a finite eta, found nan"):
        guided_sums(adapter, torch.zeros(4, 5), 0, eta=float("nan"))
    with pytest.raises(PruneError, match=r"q needs an adapter of a weight \(12, 12\), found one of \(4, 5\)"):
        guided("q", adapter, torch.zeros(12, 12), SHAPE)
    with pytest.raises(PruneError, match="a rank must be positive, found 0"):
        side_matched("q", SHAPE, 0, generator())
    with pytest.raises(PruneError, match="unknown role"):
        side_matched("router", SHAPE, 1, generator())
    with pytest.raises(PruneError, match=r"expected adapters of one weight \(out, in\) and scaling, found \[\]"):
        averaged([])
    with pytest.raises(PruneError, match=r"found \[\(4, 5, 1.0\), \(4, 5, 2.0\)\]"):
        averaged([adapter, Adapter(a, b, a, b, 2.0)])

"""Covariance against its float64 twin. Tolerance 1e-6 of the largest entry: products are fp32 of 1,024 tokens."""

import pytest
import torch

import quant.moments
from quant import reference
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.moments import Covariance, pack_triangle, token_weights, triangle_size, unpack_triangle

FEATURES = 6


def _batches(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 900), (1, 5), (1300,)]
    inputs = [torch.randn(*shape, FEATURES, generator=generator) + 1 for shape in shapes]
    return inputs, [torch.rand(shape, generator=generator) for shape in shapes]


def _covariance(inputs, weights, features=FEATURES):
    found = Covariance(features)
    for x, weight in zip(inputs, weights, strict=True):
        found.update(x, weight)
    return found


def _close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("panel", [1, 4, 1024])
def test_mean_is_the_weighted_mean_of_outer_products(panel, monkeypatch):
    monkeypatch.setattr(quant.moments, "_PANEL", panel)
    inputs, weights = _batches()
    found, expected = _covariance(inputs, weights), reference.covariance(inputs, weights)
    mean = found.mean()
    _close(mean, expected)
    assert torch.equal(mean, mean.T)
    _close(found.diagonal(), expected.diagonal())
    _close(unpack_triangle(found.triangle()).double(), expected)
    assert found.triangle().dtype == torch.float32
    damping = 0.25 * expected.diagonal().mean() * torch.eye(FEATURES)
    _close(found.damped(0.25), expected + damping)


def test_without_weights_tokens_count_alike():
    inputs, _ = _batches()
    ones = [torch.ones(x.shape[:-1]) for x in inputs]
    found = _covariance(inputs, [None] * 3)
    assert torch.equal(found.mean(), _covariance(inputs, ones).mean())
    assert found.weight == 3105
    _close(found.mean(), reference.covariance(inputs, ones))


def test_merging_is_seeing_all_tokens():
    inputs, weights = _batches()
    whole, part = _covariance(inputs, weights), _covariance(inputs[:1], weights[:1])
    part.merge(_covariance(inputs[1:], weights[1:]))
    torch.testing.assert_close(part.mean(), whole.mean(), rtol=1e-14, atol=0)
    assert part.weight == pytest.approx(whole.weight, rel=1e-14)
    assert part.top_share() == pytest.approx(whole.top_share(), rel=1e-14)
    for order in ([0, 1, 2], [2, 1, 0]):
        part = Covariance(FEATURES)
        for number in order:
            part.merge(_covariance(inputs[number : number + 1], weights[number : number + 1]))
        assert part.top_share() == pytest.approx(whole.top_share(), rel=1e-14)
    with pytest.raises(ShapeError, match="6 and 5 features"):
        part.merge(Covariance(5))


def test_small_tokens_are_not_lost_beside_a_massive_one():
    x = torch.full((1, 2), 3e4)
    found = _covariance([x, *[torch.ones(1, 2)] * 1000], [None] * 1001, features=2)
    assert found.total[0, 0].item() == 9e8 + 1000


def test_top_share_is_the_heaviest_tokens_part_of_the_trace():
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert _covariance([x], [None], 2).top_share() == pytest.approx(25 / 26, rel=1e-6)
    assert _covariance([x], [torch.tensor([0.0, 2.0])], 2).top_share() == 1
    assert _covariance([x[:1], x[1:]], [torch.tensor([1.0]), torch.tensor([75.0])], 2).top_share() == pytest.approx(
        0.75, rel=1e-6
    )
    assert _covariance([torch.zeros(3, 2)], [None], 2).top_share() == 0


def test_dead_features_have_zero_rows():
    inputs, weights = _batches()
    inputs[0][..., 2] = inputs[1][..., 2] = inputs[2][..., 2] = 0
    mean = _covariance(inputs, weights).mean()
    assert not mean[2].any()
    assert not mean[:, 2].any()
    assert mean.diagonal().count_nonzero() == FEATURES - 1


def test_one_token_is_its_outer_product():
    x = torch.tensor([1.0, -2.0, 3.0])
    _close(_covariance([x], [torch.tensor(0.5)], 3).mean(), torch.outer(x, x).double())


def test_half_precision_and_no_gradient():
    x = torch.full((3, FEATURES), 1e-5, dtype=torch.float16)
    found = _covariance([x], [None]).diagonal()
    torch.testing.assert_close(found, x[0].double().square(), rtol=1e-6, atol=0)
    x = torch.ones(3, FEATURES, requires_grad=True)
    assert not _covariance([2 * x], [None]).total.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_refused_batch_adds_nothing(bad):
    found = _covariance(*_batches())
    before = found.mean(), found.weight, found.top_share()
    x = torch.ones(2000, FEATURES)
    x[-1, 3] = bad
    with pytest.raises(NonFiniteError, match="inputs"):
        found.update(x)
    with pytest.raises(NonFiniteError, match="weights"):
        found.update(torch.ones(2, FEATURES), torch.tensor([1.0, float("nan")]))
    with pytest.raises(QuantError, match="negative, got -1"):
        found.update(torch.ones(2, FEATURES), torch.tensor([1.0, -1.0]))
    with pytest.raises(ShapeError, match=r"inputs must be \[..., 6\]"):
        found.update(torch.ones(2, 5))
    with pytest.raises(ShapeError, match=r"must be \[2, 3\], got \[6\]"):
        found.update(torch.ones(2, 3, FEATURES), torch.ones(6))
    found.update(torch.ones(0, FEATURES))
    assert torch.equal(found.mean(), before[0])
    assert (found.weight, found.top_share()) == before[1:]


def test_no_weight_at_all_is_an_error():
    found = _covariance([torch.ones(2, FEATURES)], [torch.zeros(2)])
    for ask in (found.mean, found.diagonal, found.triangle, lambda: found.damped(0.1)):
        with pytest.raises(QuantError, match="sum to zero"):
            ask()


def test_token_weights_have_mean_one():
    norms = torch.tensor([0.0, 1e-12, 3e-12])
    torch.testing.assert_close(token_weights(norms), torch.tensor([0.0, 0.75, 2.25]), rtol=1e-6, atol=0)
    assert token_weights(torch.zeros(3)).tolist() == [1, 1, 1]
    with pytest.raises(NonFiniteError, match="norms"):
        token_weights(torch.tensor([1.0, float("inf")]))
    with pytest.raises(QuantError, match="negative, got -1"):
        token_weights(torch.tensor([-1.0, 2.0]))


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_triangles_come_back(n):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
    matrix = matrix + matrix.T
    packed = pack_triangle(matrix)
    assert packed.shape == (n * (n + 1) // 2,) == (triangle_size(n),)
    assert torch.equal(packed, matrix[tuple(torch.tril_indices(n, n))])
    assert torch.equal(unpack_triangle(packed), matrix)


def test_what_is_no_triangle_is_refused():
    with pytest.raises(ShapeError, match=r"\[n, n\], got \[2, 3\]"):
        pack_triangle(torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"entries, got \[4\]"):
        unpack_triangle(torch.ones(4))
    with pytest.raises(ShapeError, match=r"entries, got \[3, 1\]"):
        unpack_triangle(torch.ones(3, 1))

"""Tolerances: losses 1e-5 relative in fp32 and 1e-10 in float64; fits 1e-10 where the subspace is the whole space."""

import math

import pytest
import torch

from quant import reference
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.metric import Metric

M, N = 11, 20


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _matrix(rows=M, columns=N, seed=0, dtype=torch.float64):
    return torch.randn(rows, columns, generator=_generator(seed), dtype=dtype)


def _covariance(size=N, tokens=60, seed=1, dtype=torch.float64):
    tokens = _matrix(tokens, size, seed, dtype) * torch.linspace(0.3, 3, size, dtype=dtype)
    return tokens.T @ tokens / len(tokens)


def _outputs(size=M, dtype=torch.float64):
    return torch.rand(size, generator=_generator(2), dtype=dtype) + 0.2


def _fit(metric, matrix, rank, seed=3):
    left, right = metric.fit(matrix, rank, _generator(seed))
    assert (left.shape, right.shape) == ((len(matrix), rank), (rank, matrix.shape[1]))
    return left @ right


@pytest.mark.parametrize("shape", [(5, 7), (3000, 200)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["none", "inputs", "covariance"])
def test_loss_is_the_definition(shape, weighted, kind):
    error = _matrix(*shape, dtype=torch.float32)
    outputs = _outputs(shape[0], torch.float32) if weighted else None
    inputs = torch.rand(shape[1], generator=_generator(4)) if kind == "inputs" else None
    covariance = _covariance(shape[1], dtype=torch.float32) if kind == "covariance" else None
    hessian = {"none": torch.eye(shape[1]), "covariance": covariance}.get(kind)
    hessian = torch.diag(inputs.double().square()) if hessian is None else hessian
    expected = reference.metric_loss(error, torch.ones(shape[0]) if outputs is None else outputs, hessian)
    tolerance = 1e-5 if kind == "covariance" else 1e-12
    assert Metric(outputs, inputs, covariance).loss(error) == pytest.approx(expected, rel=tolerance)


def test_a_loss_is_never_negative_and_never_hides_a_nan():
    error = torch.tensor([[1.0, -1.0]])
    for seed in range(40):  # errors that one token does not see, but for rounding
        token = torch.randn(8, generator=_generator(seed))
        unseen = torch.randn(1, 8, generator=_generator(seed + 100))
        unseen -= (unseen @ token) / (token @ token) * token
        assert Metric(covariance=torch.outer(token, token)).loss(unseen) >= 0
    for metric in (Metric(), Metric(covariance=torch.eye(2))):
        assert math.isnan(metric.loss(error * float("nan")))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_fit_attains_the_tail_of_the_singular_values(weighted, rank):
    """The optimum by three factors of H = F F^T: symmetric root, eigenbasis, Cholesky; and the inverse-free form."""
    matrix, covariance, outputs = _matrix(), _covariance(), _outputs() if weighted else None
    metric = Metric(outputs, covariance=covariance)
    found = _fit(metric, matrix, rank)
    rows = torch.ones(M, dtype=torch.float64) if outputs is None else outputs
    values, vectors = torch.linalg.eigh(covariance)
    for factor in (
        vectors @ torch.diag(values.sqrt()) @ vectors.T,
        vectors @ torch.diag(values.sqrt()),
        torch.linalg.cholesky(covariance),
    ):
        u, s, vh = torch.linalg.svd(rows[:, None] * matrix @ factor, full_matrices=False)
        optimum = torch.div((u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(factor), rows[:, None])
        torch.testing.assert_close(found, optimum, rtol=0, atol=1e-10)
        assert metric.loss(matrix - found) == pytest.approx(s[rank:].square().sum().item(), rel=1e-10)


def test_no_perturbation_improves_a_fit():
    matrix, metric = _matrix(), Metric(_outputs(), covariance=_covariance())
    left, right = metric.fit(matrix, 4, _generator())
    best = metric.loss(matrix - left @ right)
    for seed in range(20):
        nudge = 1e-3 * _matrix(M, 4, seed), 1e-3 * _matrix(4, N, seed + 100)
        assert metric.loss(matrix - (left + nudge[0]) @ (right + nudge[1])) > best


def test_a_covariance_without_correlation_is_what_it_stands_for():
    matrix, inputs = _matrix(), torch.linspace(0.5, 2, N, dtype=torch.float64)
    identity = _fit(Metric(covariance=torch.eye(N, dtype=torch.float64)), matrix, 8)
    torch.testing.assert_close(identity, _fit(Metric(), matrix, 8), rtol=0, atol=1e-10)
    diagonal = _fit(Metric(_outputs(), covariance=torch.diag(inputs.square())), matrix, 8)
    torch.testing.assert_close(diagonal, _fit(Metric(_outputs(), inputs), matrix, 8), rtol=0, atol=1e-10)
    torch.testing.assert_close(diagonal, reference.weighted_lowrank(matrix, 8, _outputs(), inputs), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_singular_covariance_is_no_exception(tokens):
    """All that a few tokens span is fitted, and the rest costs nothing."""
    matrix, covariance = _matrix(), _covariance(tokens=tokens)
    metric = Metric(_outputs(), covariance=covariance)
    assert metric.loss(matrix - _fit(metric, matrix, tokens)) <= 1e-12 * metric.loss(matrix)
    left, right = metric.fit(matrix, tokens + 2, _generator())
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
    assert metric.loss(matrix - left @ right) <= 1e-12 * metric.loss(matrix)
    dead = torch.zeros(N, N, dtype=torch.float64)
    left, right = Metric(covariance=dead).fit(matrix, 2, _generator())
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())


def test_directions_are_sorted_and_sides_balanced():
    matrix, metric = _matrix(), Metric(_outputs(), covariance=_covariance())
    left, right = metric.fit(matrix, 6, _generator())
    assert torch.linalg.vector_norm(left, dim=0).tolist() == pytest.approx(right.norm(dim=1).tolist())
    for rank in range(6):
        torch.testing.assert_close(
            left[:, :rank] @ right[:rank], _fit(metric, matrix, rank, seed=9), rtol=0, atol=1e-10
        )


def test_a_large_fp32_fit_is_near_the_optimum():
    """1 % above the tail, where the subspace is a part of the space and one input is massive."""
    matrix = _matrix(96, 4, 5, torch.float32) @ _matrix(4, 128, 6, torch.float32) + _matrix(96, 128, 7, torch.float32)
    tokens = _matrix(512, 128, 8, torch.float32)
    tokens[:, 5] *= 135.0
    covariance = tokens.T @ tokens / 512
    metric = Metric(covariance=covariance)
    values, vectors = torch.linalg.eigh(covariance.double())
    tail = torch.linalg.svdvals(matrix.double() @ (vectors * values.clamp(min=0).sqrt()))[8:].square().sum().item()
    assert tail * (1 - 1e-4) < metric.loss(matrix - _fit(metric, matrix, 8)) < 1.01 * tail


def test_a_dead_output_leaves_factors_finite():
    outputs = _outputs()
    outputs[3] = 0
    metric = Metric(outputs, covariance=_covariance())
    left, right = metric.fit(_matrix(), 4, _generator())
    assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())
    alive = [row for row in range(M) if row != 3]
    others = Metric(outputs[alive], covariance=_covariance())
    best = others.loss(_matrix()[alive] - _fit(others, _matrix()[alive], 4))
    assert metric.loss(_matrix() - left @ right) == pytest.approx(best, rel=1e-6)


def test_the_transposed_metric_swaps_its_sides():
    metric = Metric(_outputs(), torch.linspace(0.5, 2, N, dtype=torch.float64))
    assert metric.transposed.loss(_matrix().T) == pytest.approx(metric.loss(_matrix()), rel=1e-12)
    with pytest.raises(QuantError, match="cannot change sides"):
        _ = Metric(covariance=_covariance()).transposed


def test_bad_requests_are_refused():
    matrix, covariance = _matrix(), _covariance()
    with pytest.raises(QuantError, match="not both"):
        Metric(inputs=torch.ones(N), covariance=covariance)
    for metric, complaint in (
        (Metric(torch.ones(N)), r"output weights must be \[11\] for a \[11, 20\] matrix, got \[20\]"),
        (Metric(inputs=torch.ones(M)), r"input weights must be \[20\]"),
        (Metric(covariance=covariance[:5, :5]), r"covariance must be \[20, 20\]"),
    ):
        with pytest.raises(ShapeError, match=complaint):
            metric.loss(matrix)
        with pytest.raises(ShapeError, match=complaint):
            metric.fit(matrix, 2, _generator())
    with pytest.raises(ShapeError, match="expected a matrix"):
        Metric().loss(matrix[0])
    for rank in (-1, M + 1):
        with pytest.raises(ShapeError, match=rf"rank {rank} is outside 0\.\.11"):
            Metric(covariance=covariance).fit(matrix, rank, _generator())
    with pytest.raises(NonFiniteError, match="row weight"):
        Metric(_outputs() / 0, covariance=covariance).fit(matrix, 2, _generator())
    with pytest.raises(QuantError, match="negative"):
        Metric(-_outputs(), covariance=covariance).fit(matrix, 2, _generator())
    matrix[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="matrix holds NaN"):
        Metric(covariance=covariance).fit(matrix, 2, _generator())

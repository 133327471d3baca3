"""Moments of inputs and gates against autograd and float64 sums over all tokens at once."""

import pytest
import torch

from prune.exceptions import PruneError
from prune.groups import LayerShape
from prune.moments import ReaderMoments, variance
from prune.taylor import gates


def test_gates_are_the_gradients_of_gates_sample_by_sample() -> None:
    torch.manual_seed(0)
    weight, gate = torch.randn(5, 6), torch.ones(3, 1, 6, requires_grad=True)
    # More tokens than are worked on at once.
    x = torch.randn(3, 300, 6)
    gated = (x * gate).requires_grad_()
    gated.retain_grad()
    (gated @ weight.T).tanh().square().sum().backward()
    assert gate.grad is not None
    assert gated.grad is not None
    moments = ReaderMoments(6, 3)
    moments.update_gates(x[1:], gated.grad[1:], slice(1, 3))
    moments.update_gates(x[:1], gated.grad[:1], slice(0, 1))
    torch.testing.assert_close(moments.gates, gate.grad[:, 0].double(), rtol=1e-4, atol=1e-3)
    shape = LayerShape(hidden=5, heads=2, kv_heads=1, head_dim=3, ffn=4)
    assert gates("o", moments.gates, shape).item() == pytest.approx(moments.gates.sum(dim=1).abs().mean().item())


def test_mean_and_variance_over_all_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 500, 3) + torch.tensor([0.0, 5.0, 0.0]) * torch.tensor([1.0, 1.0, 0.0])
    x[..., 2] = 0.1
    moments = ReaderMoments(3, 4)
    for part in x:
        moments.update_input(part)
    flat = x.reshape(-1, 3).double()
    assert moments.input_tokens == 2000
    torch.testing.assert_close(moments.mean(), flat.mean(dim=0).float())
    found = variance(flat.square().mean(dim=0).float(), moments.mean())
    torch.testing.assert_close(found, flat.var(dim=0, correction=0), rtol=1e-4, atol=1e-8)
    assert (found >= 0).all()
    # A difference of rounded means that is below zero.
    assert variance(torch.tensor([0.0099999]), torch.tensor([0.1])).item() == 0


def test_bad_arguments() -> None:
    moments, x = ReaderMoments(3, 2), torch.zeros(2, 5, 3)
    with pytest.raises(PruneError, match="no inputs were seen"):
        moments.mean()
    with pytest.raises(PruneError, match=r"expected inputs \[\.\.\., 3\], found \(2, 4\)"):
        moments.update_input(torch.zeros(2, 4))
    for gradient, samples in ((x[:, :4], slice(0, 2)), (x, slice(0, 1))):
        with pytest.raises(PruneError, match=r"inputs and gradients of \d samples"):
            moments.update_gates(x, gradient, samples)
    with pytest.raises(PruneError, match="a mean for every mean square"):
        variance(torch.zeros(3), torch.zeros(2))

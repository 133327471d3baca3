"""Tolerances: float64 against a loop 1e-12 relative; a bias is rounded to fp32 once, 1e-6."""

import statistics

import pytest
import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.flap import flap, fluctuation, mean_bias, standardised
from prune.groups import LayerShape, shape_of
from prune.slice import slice_rows_or_columns

# 300 rows cross the row block of the sums.
SHAPES = {
    "mha": LayerShape(hidden=7, heads=3, kv_heads=3, head_dim=2, ffn=5),
    "gqa": LayerShape(hidden=300, heads=6, kv_heads=2, head_dim=3, ffn=8),
    "mqa": LayerShape(hidden=5, heads=4, kv_heads=1, head_dim=2, ffn=4),
}
CASES = [(family, role) for family in SHAPES for role in ("o", "down")]


def problem(family: str, role: str) -> tuple[LayerShape, Tensor, Tensor]:
    """A shape, a weight of it, and the inputs of 40 tokens, off zero and of uneven scale."""
    shape, drawn = SHAPES[family], torch.Generator().manual_seed(3)
    out, fan_in = shape_of(role, shape)
    weight = torch.randn(out, fan_in, generator=drawn)
    scale, offset = torch.rand(fan_in, generator=drawn) * 3, torch.randn(fan_in, generator=drawn)
    return shape, weight, (torch.randn(40, fan_in, generator=drawn) * scale + offset).double()


def slow_fluctuation(weight: Tensor, inputs: Tensor) -> list[float]:
    found = []
    for values, column in zip(inputs.T.tolist(), weight.T.tolist(), strict=True):
        found.append(statistics.variance(values) * sum(value * value for value in column))
    return found


@pytest.mark.parametrize(("family", "role"), CASES)
def test_fluctuation_is_the_slow_loop(family: str, role: str) -> None:
    shape, weight, inputs = problem(family, role)
    found = fluctuation(role, weight, inputs.var(dim=0), shape)
    slow = slow_fluctuation(weight, inputs)
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=0)
    groups = flap(role, weight, inputs.var(dim=0), shape)
    width = len(slow) // len(groups)
    expected = [sum(slow[start : start + width]) for start in range(0, len(slow), width)]
    torch.testing.assert_close(groups, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("family", "role"), CASES)
def test_standardised_is_the_slow_loop(family: str, role: str) -> None:
    shape, weight, inputs = problem(family, role)
    channels = fluctuation(role, weight, inputs.var(dim=0), shape)
    found = standardised(role, channels, shape)
    values = channels.tolist()
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    scaled, width = [(value - mean) / deviation for value in values], len(values) // len(found)
    expected = [statistics.mean(scaled[start : start + width]) for start in range(0, len(scaled), width)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_standardised_layers_compare_whatever_their_scale() -> None:
    shape = SHAPES["mha"]
    channels = torch.tensor([1.0, 2.0, 4.0, 4.0, 9.0, 7.0])
    found = standardised("o", channels, shape)
    assert found.argsort().tolist() == [0, 1, 2]
    torch.testing.assert_close(found, standardised("o", channels * 1000 + 7, shape), rtol=1e-12, atol=1e-12)
    assert standardised("o", torch.full((6,), 0.1), shape).tolist() == [0.0] * 3
    single = LayerShape(hidden=2, heads=1, kv_heads=1, head_dim=1, ffn=1)
    assert standardised("down", torch.tensor([5.0]), single).tolist() == [0.0]
    assert bool(standardised("o", channels.log() * torch.inf, shape).isnan().all())


def test_bad_input_is_refused() -> None:
    shape = SHAPES["mha"]
    weight = torch.ones(shape_of("o", shape))
    with pytest.raises(PruneError, match="expected o or down"):
        fluctuation("v", torch.ones(shape_of("v", shape)), torch.ones(7), shape)
    with pytest.raises(PruneError, match=r"its 6 input moments, found o with \(7, 6\) and \(7,\)"):
        flap("o", weight, torch.ones(7), shape)
    with pytest.raises(PruneError, match="o: mean squares and variances are not negative, found -1"):
        flap("o", weight, -torch.ones(6), shape)
    with pytest.raises(PruneError, match=r"o has 6 channels that can go, found values \(5,\)"):
        standardised("o", torch.ones(5), shape)


@pytest.mark.parametrize(("family", "role"), CASES)
def test_the_mean_of_what_goes_is_the_slow_loop(family: str, role: str) -> None:
    shape, weight, inputs = problem(family, role)
    mean, width = inputs.mean(dim=0).float(), weight.shape[1]
    kept, bias = torch.arange(0, width, 2), torch.randn(len(weight))
    gone = [j for j in range(width) if j % 2]
    slow = [sum(row[j] * mean[j].item() for j in gone) for row in weight.tolist()]
    found = mean_bias(role, weight, mean, kept, shape)
    torch.testing.assert_close(found, torch.tensor(slow), rtol=1e-6, atol=1e-6)
    both = mean_bias(role, weight, mean, kept, shape, bias)
    torch.testing.assert_close(both, torch.tensor(slow) + bias, rtol=1e-6, atol=1e-6)
    assert not mean_bias(role, weight, mean, torch.arange(width), shape).any()


@pytest.mark.parametrize(("family", "role"), CASES)
def test_inputs_that_never_vary_are_not_missed(family: str, role: str) -> None:
    """The cut layer with its bias is the whole one where what goes is constant, and is not without."""
    shape, weight, inputs = problem(family, role)
    kept = torch.arange(0, weight.shape[1], 2)
    inputs[:, 1::2] = inputs[0, 1::2]
    bias = mean_bias(role, weight, inputs.mean(dim=0), kept, shape)
    whole = inputs @ weight.T.double()
    cut = inputs[:, kept] @ slice_rows_or_columns(weight, role, kept).T.double()
    torch.testing.assert_close(cut + bias, whole, rtol=1e-6, atol=1e-5)
    assert (cut - whole).abs().max() > 0.1


def test_a_mean_that_does_not_fit_is_refused() -> None:
    shape, weight, inputs = problem("gqa", "down")
    mean, kept = inputs.mean(dim=0), torch.arange(4)
    with pytest.raises(PruneError, match="found down with"):
        mean_bias("down", weight, mean[1:], kept, shape)
    with pytest.raises(PruneError, match="expected o or down"):
        mean_bias("up", weight, mean, kept, shape)
    with pytest.raises(PruneError, match="strictly ascending"):
        mean_bias("down", weight, mean, kept.flip(0), shape)

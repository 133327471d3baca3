import pytest
import torch

from quant import reference
from quant.blockwise import quantize, rebuild
from quant.decompose import decompose
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.lowrank import svd_lowrank
from quant.metric import Metric
from quant.rounding import feedback
from quant.storage import Choice

FORMAT = Choice("nf", 3, 32, 8)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _weight(rows=64, columns=96, seed=0):
    return torch.randn(rows, columns, generator=_generator(seed))


def _weights(rows=64, columns=96):
    return torch.rand(rows, generator=_generator(8)) + 0.05, torch.rand(columns, generator=_generator(9)) + 0.05


def _dense(quantized, choice=FORMAT):
    return rebuild(quantized, choice)


@pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_that_of_what_is_returned(factor_dtype, weighted):
    weight, choice = _weight(), Choice("nf", 3, 32, 8, factor_dtype=factor_dtype)
    rows, columns = _weights() if weighted else (None, None)
    result = decompose(weight, choice, generator=_generator(), metric=Metric(rows, columns))
    assert result.left.dtype == result.right.dtype == getattr(torch, factor_dtype)
    assert (result.factor_scale is None) == (factor_dtype != "int8")
    left = result.left.float() * (1 if result.factor_scale is None else result.factor_scale)
    error = weight - left @ result.right.float() - _dense(result.quantized)
    ones = torch.ones(64), torch.ones(96)
    expected = reference.weighted_loss(error, *((rows, columns) if weighted else ones))
    assert result.loss == pytest.approx(expected, rel=1e-5)


def test_returns_the_best_iterate():
    result = decompose(_weight(), FORMAT, generator=_generator(), max_iterations=40)
    assert len(result.losses) > 1
    assert result.loss == min(result.losses) == result.losses[result.at]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_stops_after_patience_iterations_without_improvement(patience):
    result = decompose(_weight(), Choice("nf", 2, 32, 4), generator=_generator(), max_iterations=200, patience=patience)
    assert len(result.losses) < 200
    assert len(result.losses) == result.at + 1 + patience
    # No earlier run of `patience` iterations failed to improve on the best so far.
    stale, best = 0, float("inf")
    for loss in result.losses[:-1]:
        stale, best = (0, loss) if loss < best else (stale + 1, best)
        assert stale < patience


def test_iterations_are_capped():
    assert len(decompose(_weight(), FORMAT, generator=_generator(), max_iterations=3, patience=9).losses) == 3


def test_rank_zero_is_plain_quantisation():
    weight = _weight()
    result = decompose(weight, Choice("nf", 3, 32, 0), generator=_generator())
    assert torch.equal(result.quantized.codes, quantize(weight, FORMAT).codes)
    assert len(result.losses) == 1
    assert (result.left.shape, result.right.shape) == ((64, 0), (0, 96))


def test_factors_are_rounded_before_quantising():
    weight = _weight()
    result = decompose(weight, FORMAT, generator=_generator(), max_iterations=1)
    residual = weight - result.left.float() @ result.right.float()
    assert torch.equal(result.quantized.codes, quantize(residual, FORMAT).codes)


def test_first_factors_replace_the_first_fit():
    weight = _weight()
    first = svd_lowrank(weight, 8, generator=_generator(5), exact=True)
    result = decompose(weight, FORMAT, generator=_generator(), first=first, max_iterations=1)
    assert torch.equal(result.left, first[0].bfloat16())
    # The second fit is then the first draw of the generator.
    two = decompose(weight, FORMAT, generator=_generator(), first=first, max_iterations=2)
    left, _ = svd_lowrank(weight - _dense(result.quantized), 8, generator=_generator())
    assert two.at == 1
    assert torch.equal(two.left, left.bfloat16())


def test_levels_of_the_callers_own_reach_every_iteration():
    levels = torch.linspace(-0.9, 0.8, 8)
    choice = Choice("lloyd", 3, 32, 8)
    result = decompose(_weight(), choice, generator=_generator(), max_iterations=3, levels=levels)
    assert torch.equal(result.quantized.levels, levels)
    assert result.losses != decompose(_weight(), choice, generator=_generator(), max_iterations=3).losses


def test_same_seed_same_bits():
    one, two = (decompose(_weight(), FORMAT, generator=_generator(4)) for _ in range(2))
    assert one.losses == two.losses
    assert torch.equal(one.left, two.left)
    assert torch.equal(one.right, two.right)
    assert torch.equal(one.quantized.codes, two.quantized.codes)


def test_weighting_pays_in_its_own_metric():
    weight, (rows, columns) = _weight(), _weights()
    weighted = decompose(weight, FORMAT, generator=_generator(), metric=Metric(rows, columns))
    plain = decompose(weight, FORMAT, generator=_generator())
    error = weight - plain.left.float() @ plain.right.float() - _dense(plain.quantized)
    assert weighted.loss < Metric(rows, columns).loss(error)


def test_input_is_left_alone():
    weight = _weight()
    kept = weight.clone()
    decompose(weight, FORMAT, generator=_generator(), max_iterations=2)
    assert torch.equal(weight, kept)


def test_bad_requests_are_refused():
    weight, generator = _weight(), _generator()
    with pytest.raises(QuantError, match="max_iterations"):
        decompose(weight, FORMAT, generator=generator, max_iterations=0)
    with pytest.raises(QuantError, match="patience"):
        decompose(weight, FORMAT, generator=generator, patience=0)
    with pytest.raises(ShapeError, match="rank 65"):
        decompose(weight, Choice("nf", 3, 32, 65), generator=generator)
    with pytest.raises(ShapeError, match="first factors"):
        decompose(weight, FORMAT, generator=generator, first=(weight[:, :8], weight[:7]))
    with pytest.raises(ShapeError, match="blocks of 64"):
        decompose(weight, Choice("nf", 3, 64, 8), generator=generator)
    with pytest.raises(ShapeError, match="input weights"):
        decompose(weight, FORMAT, generator=generator, metric=Metric(inputs=torch.ones(64)))
    with pytest.raises(ShapeError, match="blocks of 16 together, expected 32"):
        decompose(weight, FORMAT, generator=generator, passing=feedback(torch.eye(96), 16))
    weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        decompose(weight, FORMAT, generator=generator)

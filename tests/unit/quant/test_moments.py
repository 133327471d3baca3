import pytest
import torch

from quant import reference
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.moments import DiagonalMoments


def _batches(features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, features, generator=generator) for shape in [(2, 300), (1, 5), (700,)]]


def _moments(inputs=(), grads=()):
    moments = DiagonalMoments(6, 4)
    for x in inputs:
        moments.update_input(x)
    for g in grads:
        moments.update_grad(g)
    return moments


def test_weights_are_root_mean_squares():
    inputs, grads = _batches(6), _batches(4, seed=1)
    moments = _moments(inputs, grads)
    assert (moments.input_tokens, moments.grad_tokens) == (1305, 1305)
    for weight, batches in [(moments.column_weight(), inputs), (moments.row_weight(), grads)]:
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), reference.root_mean_square(batches), rtol=1e-6, atol=0)


def test_inputs_and_gradients_are_counted_apart():
    moments = _moments(_batches(6), _batches(4)[:1])
    torch.testing.assert_close(
        moments.row_weight().double(), reference.root_mean_square(_batches(4)[:1]), rtol=1e-6, atol=0
    )


def test_merging_equals_one_run():
    inputs, grads = _batches(6), _batches(4)
    whole, part = _moments(inputs, grads), _moments(inputs[:1], grads[:2])
    part.merge(_moments(inputs[1:], grads[2:]))
    torch.testing.assert_close(part.input_squares, whole.input_squares, rtol=1e-14, atol=0)
    torch.testing.assert_close(part.grad_squares, whole.grad_squares, rtol=1e-14, atol=0)
    assert (part.input_tokens, part.grad_tokens) == (whole.input_tokens, whole.grad_tokens)


def test_half_precision_is_squared_in_float64():
    # 1e-5 squared is zero in fp16, 3e4 squared is infinite.
    for value in (1e-5, 3e4):
        x = torch.full((3, 6), value, dtype=torch.float16)
        expected = x[0].float()
        torch.testing.assert_close(_moments([x]).column_weight(), expected, rtol=1e-6, atol=0)


def test_small_additions_are_not_lost():
    moments = _moments([torch.full((1, 6), 1e4)])
    for _ in range(1000):
        moments.update_input(torch.full((1, 6), 1.0))
    assert moments.input_squares.tolist() == [1e8 + 1000] * 6


def test_gradients_do_not_flow_and_input_is_left_alone():
    x = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    moments = _moments([2 * x])
    assert not moments.input_squares.requires_grad
    y = torch.full((3, 6), 3.0, dtype=torch.float64)
    moments.update_input(y)
    assert y.unique().tolist() == [3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_refused_batch_adds_nothing(bad):
    moments = _moments(_batches(6), _batches(4))
    before = moments.column_weight(), moments.row_weight()
    with pytest.raises(NonFiniteError, match="inputs"):
        moments.update_input(torch.full((2, 6), bad))
    with pytest.raises(NonFiniteError, match="gradients"):
        moments.update_grad(torch.full((2, 4), bad))
    with pytest.raises(ShapeError, match="inputs"):
        moments.update_input(torch.ones(2, 4))
    assert torch.equal(moments.column_weight(), before[0])
    assert torch.equal(moments.row_weight(), before[1])


def test_bad_requests_are_refused():
    with pytest.raises(QuantError, match="no inputs"):
        _moments().column_weight()
    with pytest.raises(QuantError, match="no gradients"):
        _moments().row_weight()
    with pytest.raises(ShapeError, match="merged"):
        _moments().merge(DiagonalMoments(6, 5))
    with pytest.raises(ShapeError, match="merged"):
        _moments().merge(DiagonalMoments(5, 4))

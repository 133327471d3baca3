"""L4Q against hand arithmetic, finite differences and autograd surrogates.

Tolerances: golden vector 1e-12 absolute; gradients against the float64 surrogate 1e-10 relative; chunked
    against unchunked and split against whole batches 1e-12 relative.
"""

import itertools

import pytest
import torch
from fakequant_samples import surrogate_weight
from torch.nn import functional as F

from quant import grid
from quant.fakequant import L4QLinear, l4q_linear

NAMES = ("x", "lora_a", "lora_b", "scale", "offset")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(bits, group, rank, tokens, *, shrink, rows=6, groups=2, offset="trained"):
    """Float64 operands; ``shrink`` < 1 makes weights clip, a large one keeps every weight in range."""
    gen = generator(bits * 1000 + group * 10 + rank)
    columns = group * groups
    draw = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    weight = draw(rows, columns)
    scale = grid.init_grid(weight, bits, group)[0] * shrink
    trained = 0.4 * scale * draw(rows, groups)
    tensors = {
        "x": draw(tokens, columns),
        "lora_a": draw(rank, columns) * 0.2,
        "lora_b": draw(rows, rank) * 0.2,
    }
    tensors |= {"scale": scale, "offset": trained if offset == "trained" else None}
    return weight, tensors, draw(tokens, rows)


def gradients(function, tensors, grad_y):
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items() if v is not None}
    y = function(leaves)
    y.backward(grad_y)
    return y.detach(), {k: v.grad for k, v in leaves.items()}


def ours(weight, bits, group, alpha=0.7, row_chunk=None, half=False):
    def call(t):
        return l4q_linear(
            *(t["x"], weight, t["lora_a"], t["lora_b"], t["scale"], t.get("offset")),
            alpha=alpha,
            bits=bits,
            group_size=group,
            half=half,
            row_chunk=row_chunk,
        )

    return call


def plain(weight, bits, alpha=0.7, half=False):
    def call(t):
        operands = (t["lora_a"], t["lora_b"], t["scale"], t.get("offset"))
        dense, _ = surrogate_weight(weight, *operands, alpha, bits, half=half)
        return t["x"] @ dense.t()

    return call


def test_golden_vector():
    def f64(*rows):
        return torch.tensor(rows, dtype=torch.float64)

    weight = f64([0.9, -1.3, 0.2, -0.05])
    tensors = {"x": f64([1, 2, -3, 4]), "lora_a": f64([0.5, -0.5, 1, 0]), "lora_b": f64([0.4])}
    tensors |= {"scale": f64([0.3]), "offset": f64([0.05])}
    merged = f64([1.0, -1.4, 0.4, -0.05])
    codes, in_range = grid.quantize(merged, tensors["scale"], tensors["offset"], 3)
    assert codes.tolist() == [[3, -4, 1, 0]]
    assert in_range.tolist() == [[False, False, True, True]]
    y, grads = gradients(ours(weight, 3, 4, alpha=0.5), tensors, f64([1]))
    expected = {
        "x": f64([0.95, -1.15, 0.35, 0.05]),
        "scale": f64([-19 / 6]),
        "offset": f64([3]),
        "lora_a": f64([0, 0, -0.6, 0.8]),
        "lora_b": f64([-1.5]),
    }
    torch.testing.assert_close(y, f64([-2.2]), rtol=0, atol=1e-12)
    for name in NAMES:
        torch.testing.assert_close(grads[name], expected[name], rtol=0, atol=1e-12)


CASES = list(itertools.product((2, 3, 4, 8), ((4, 1, 3), (16, 4, 7)), (0.6, 4.0), ("zero", "half", "trained")))


@pytest.mark.parametrize(("bits", "sizes", "shrink", "offset"), CASES)
def test_gradients_match_the_autograd_surrogate(bits, sizes, shrink, offset):
    (group, rank, tokens), half = sizes, offset == "half"
    weight, tensors, grad_y = problem(bits, group, rank, tokens, shrink=shrink, offset=offset)
    merged = weight + 0.7 * tensors["lora_b"] @ tensors["lora_a"]
    at = 0.5 * tensors["scale"] if half else tensors["offset"]
    clipped = (~grid.quantize(merged, tensors["scale"], at, bits)[1]).double().mean()
    assert 0.04 < clipped < 0.7 if shrink < 1 else clipped == 0
    y, grads = gradients(ours(weight, bits, group, half=half), tensors, grad_y)
    expected_y, expected = gradients(plain(weight, bits, half=half), tensors, grad_y)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(grads[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    if offset == "trained":
        grad_w = grad_y.t() @ tensors["x"]
        mask = grid.quantize(merged, tensors["scale"], tensors["offset"], bits)[1]
        by_hand = (grad_w * ~mask).view(*tensors["scale"].shape, -1).sum(-1)
        torch.testing.assert_close(grads["offset"], by_hand, rtol=1e-10, atol=1e-12)
        assert (grads["offset"] == 0).all() == (shrink > 1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gradients_match_finite_differences_with_the_residual_frozen(bits, half):
    weight, tensors, grad_y = problem(bits, 4, 2, 3, shrink=0.6, offset="half" if half else "trained")
    operands = [tensors[n] for n in NAMES[1:]]
    _, residual = surrogate_weight(weight, *operands, 0.7, bits, half=half)
    _, grads = gradients(ours(weight, bits, 4, half=half), tensors, grad_y)

    def loss(values):
        dense, _ = surrogate_weight(weight, *(values[n] for n in NAMES[1:]), 0.7, bits, residual, half=half)
        return (values["x"] @ dense.t() * grad_y).sum().item()

    delta = 1e-6
    for name in grads:
        for index in range(tensors[name].numel()):
            values = []
            for sign in (1, -1):
                moved = {k: v if v is None else v.clone() for k, v in tensors.items()}
                moved[name].view(-1)[index] += sign * delta
                values.append(loss(moved))
            slope = (values[0] - values[1]) / (2 * delta)
            assert grads[name].reshape(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-7), name


def test_without_clipping_the_factors_get_lora_gradients():
    weight, tensors, grad_y = problem(4, 8, 3, 5, shrink=6.0)
    alpha = 0.7

    def lora(t):
        dense, _ = surrogate_weight(weight, tensors["lora_a"], tensors["lora_b"], t["scale"], t["offset"], alpha, 4)
        update = alpha * (t["lora_b"] @ t["lora_a"])
        return t["x"] @ (dense.detach() + update - update.detach()).t()

    _, grads = gradients(ours(weight, 4, 8, alpha), tensors, grad_y)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    lora(leaves).backward(grad_y)
    for name in ("x", "lora_a", "lora_b"):
        torch.testing.assert_close(grads[name], leaves[name].grad, rtol=1e-10, atol=1e-12)
    assert (grads["offset"] == 0).all()


@pytest.mark.parametrize("row_chunk", [1, 4, 6, 100])
def test_chunked_equals_unchunked(row_chunk):
    weight, tensors, grad_y = problem(3, 8, 3, 9, shrink=0.6)
    y, grads = gradients(ours(weight, 3, 8), tensors, grad_y)
    chunked_y, chunked = gradients(ours(weight, 3, 8, row_chunk=row_chunk), tensors, grad_y)
    torch.testing.assert_close(chunked_y, y, rtol=1e-12, atol=1e-12)
    for name in NAMES:
        torch.testing.assert_close(chunked[name], grads[name], rtol=1e-12, atol=1e-12)


def test_micro_batches_sum_to_the_full_batch():
    weight, tensors, grad_y = problem(4, 8, 3, 12, shrink=0.6)
    call = ours(weight, 4, 8)
    _, whole = gradients(call, tensors, grad_y)
    parts = [gradients(call, tensors | {"x": tensors["x"][c]}, grad_y[c])[1] for c in (slice(0, 5), slice(5, 12))]
    for name in NAMES[1:]:
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-12, atol=1e-12)


# --- training
# ---------------------------------------------------------------------------------------------------


def regression(train, lr=5e-3, steps=150, weight_dtype=torch.float32):
    """Loss of a 3-bit layer fitted to a nearby dense map, training only the parameters named in ``train``."""
    target = torch.randn(16, 32, generator=generator(20)) * 0.1
    weight = (target + 0.05 * torch.randn(16, 32, generator=generator(21))).to(weight_dtype)
    module = L4QLinear(weight, None, bits=3, group_size=16, rank=8, alpha=1.0, generator=generator(22))
    x = torch.randn(256, 32, generator=generator(23))
    y = F.linear(x, target)
    start = module.quantized()[0]
    optimizer = torch.optim.Adam([p for n, p in module.named_parameters() if n in train], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(module(x), y).backward()
        optimizer.step()
        module.clamp_steps_()
    return F.mse_loss(module(x), y).item(), module, start


def test_training_beats_rounding_and_steps_alone():
    rounded, _, _ = regression(train=("scale",), steps=0)
    steps_only, _, _ = regression(train=("scale",), lr=1e-3)
    joint, module, start = regression(train=("scale", "lora_a", "lora_b"))
    assert joint < 0.8 * steps_only < 0.8 * rounded
    assert (module.quantized()[0] != start).any()


def test_steps_survive_a_violent_learning_rate():
    loss, module, start = regression(train=("scale", "lora_a", "lora_b"), lr=0.3, steps=100)
    assert (module.scale >= 6.2e-5).all()
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert loss == loss
    assert (module.quantized()[0] != start).any()


def test_steps_move_by_less_than_a_bfloat16_spacing():
    weight = torch.randn(64, 256, generator=generator()).bfloat16()
    module = L4QLinear(weight, None, bits=4, group_size=64, rank=4, alpha=1.0, generator=generator(1))
    optimizer = torch.optim.Adam([module.scale], lr=5e-6)
    before = module.scale.detach().clone()
    module(torch.randn(8, 256).bfloat16()).square().sum().backward()
    optimizer.step()
    moved = (module.scale - before).abs()
    assert ((moved > 0) & (moved < 1e-5)).all()
    assert torch.finfo(torch.bfloat16).eps * before.min() > 1e-4


def test_frozen_offset_is_no_parameter_and_stays_zero():
    _, module, _ = regression(train=("scale", "lora_a", "lora_b"), steps=20)
    assert "offset" not in dict(module.named_parameters())
    assert module.quantized()[2] is None

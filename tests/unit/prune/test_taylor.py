"""Tolerances: float64 against a loop 1e-12 relative; gate identities, float64 autograd, 1e-10 relative."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prune.exceptions import PruneError
from prune.groups import ROLES, LayerShape, pruned_dim, shape_of
from prune.members import fold
from prune.taylor import gates, taylor, taylor_sums

SHAPES = {
    "mha": LayerShape(hidden=12, heads=3, kv_heads=3, head_dim=4, ffn=10),
    "gqa": LayerShape(hidden=16, heads=8, kv_heads=4, head_dim=4, ffn=300),
    "mqa": LayerShape(hidden=12, heads=4, kv_heads=1, head_dim=2, ffn=7),
}


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("role", ROLES)
def test_taylor_is_the_slow_loop(role: str, power: int) -> None:
    shape = LayerShape(hidden=5, heads=4, kv_heads=2, head_dim=2, ffn=300 if role == "gate" else 6)
    drawn = torch.Generator().manual_seed(ROLES.index(role))
    weight, grad = (torch.randn(shape_of(role, shape), generator=drawn) for _ in range(2))
    width = {"k": 2, "v": 2, "q": 4, "o": 4}.get(role, 1)
    slow = [0.0] * (2 if role in "qkvo" else shape.ffn)
    for i, (weights, grads) in enumerate(zip(weight.tolist(), grad.tolist(), strict=True)):
        for j, (w, g) in enumerate(zip(weights, grads, strict=True)):
            slow[(j if role in ("o", "down") else i) // width] += abs(w * g) ** power
    found = taylor(role, weight.double(), grad.double(), shape, power=power)
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=0)
    by_rows = taylor(role, lambda start, stop: weight[start:stop].double(), grad.double(), shape, power=power)
    assert torch.equal(by_rows, found)


def test_narrow_products_are_not_rounded() -> None:
    shape = SHAPES["mqa"]
    drawn = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(shape_of("up", shape), generator=drawn).bfloat16() for _ in range(2))
    found = taylor("up", weight, grad, shape)
    torch.testing.assert_close(found, taylor("up", weight.double(), grad.double(), shape), rtol=1e-6, atol=0)


def layer_pass(shape: LayerShape, samples: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Autograd through one decoder layer, float64: signed sums of G o W on every role's channels, [channels], and
    sums of x o dloss/dx over tokens at the inputs of o and down, [samples, channels]."""
    drawn = torch.Generator().manual_seed(7)
    weights = {
        role: torch.randn(shape_of(role, shape), generator=drawn, dtype=torch.float64).mul_(0.3).requires_grad_()
        for role in ROLES
    }
    x, target = (torch.randn(samples, 6, shape.hidden, generator=drawn, dtype=torch.float64) for _ in range(2))

    def heads(role: str) -> Tensor:
        return (x @ weights[role].T).unflatten(-1, (-1, shape.head_dim)).transpose(1, 2)

    repeat = shape.queries_per_kv
    keys, values = (heads(role).repeat_interleave(repeat, dim=1) for role in "kv")
    mixed = F.scaled_dot_product_attention(rotated(heads("q")), rotated(keys), values, is_causal=True)
    inside = {"o": mixed.transpose(1, 2).flatten(2)}
    middle = x + inside["o"] @ weights["o"].T
    inside["down"] = F.silu(middle @ weights["gate"].T) * (middle @ weights["up"].T)
    for value in inside.values():
        value.retain_grad()
    (torch.tanh(middle + inside["down"] @ weights["down"].T) - target).square().sum().backward()
    signed = {role: (w.grad * w.detach()).sum(dim=1 - pruned_dim(role)) for role, w in weights.items()}
    return signed, {role: (value.detach() * value.grad).sum(dim=1) for role, value in inside.items()}


def rotated(heads: Tensor) -> Tensor:
    """Rotary positions: the score of a query and a key stays bilinear in them."""
    half = heads.shape[-1] // 2
    angle = torch.arange(heads.shape[2])[:, None] / 10.0 ** torch.arange(half)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1
    ).to(heads.dtype)


@pytest.mark.parametrize("family", SHAPES)
def test_gates_are_signed_sums_of_gradient_times_weight(family: str) -> None:
    shape = SHAPES[family]
    signed, moments = layer_pass(shape)
    by_role = {role: fold(role, signed[role], shape) for role in ROLES}

    def same(found: Tensor, expected: Tensor) -> bool:
        return torch.allclose(found, expected, rtol=1e-10, atol=1e-12)

    # Channel by channel at the weights that read the gates, then group by group at those that feed them.
    assert same(moments["o"].sum(dim=0), signed["o"])
    assert same(moments["down"].sum(dim=0), signed["down"])
    assert same(by_role["o"], by_role["v"])
    assert same(by_role["down"], by_role["up"])
    assert same(by_role["q"], by_role["k"])
    assert not same(by_role["gate"], by_role["down"])
    assert not same(by_role["q"], by_role["o"])

    for role in ("o", "down"):
        assert same(gates(role, moments[role].sum(dim=0), shape), by_role[role].abs())
        per_sample = sum(fold(role, sample, shape).abs() for sample in moments[role]) / 3
        assert same(gates(role, moments[role], shape), per_sample)
    # Samples cancel where they are added first: here in most channels.
    assert not same(gates("down", moments["down"], shape), by_role["down"].abs() / 3)


def test_signs_within_a_group_cancel() -> None:
    shape = LayerShape(hidden=3, heads=4, kv_heads=2, head_dim=1, ffn=2)
    moments = torch.tensor([1.0, -1.0, 2.0, 1.0])
    assert gates("o", moments, shape).tolist() == [0.0, 3.0]
    assert gates("down", torch.tensor([[1.0, -3.0], [-1.0, -1.0]]), shape).tolist() == [1.0, 2.0]
    assert gates("down", torch.tensor([1, 2], dtype=torch.bfloat16), shape).dtype == torch.float64


def test_bad_input_is_refused() -> None:
    shape = SHAPES["mqa"]
    weight = torch.zeros(shape_of("q", shape))
    with pytest.raises(PruneError, match=r"expected a weight \(8, 12\), found \(12, 8\)"):
        taylor("q", weight.T, weight, shape)
    with pytest.raises(PruneError, match=r"q needs a gradient \(8, 12\), found \(8, 3\)"):
        taylor("q", weight, weight[:, :3], shape)
    with pytest.raises(PruneError, match=r"expected a gradient \[out, in\], found \(12,\)"):
        taylor_sums(weight, weight[0], 0)
    with pytest.raises(PruneError, match="axes 0 and 1, found 2"):
        taylor_sums(weight, weight, 2)
    with pytest.raises(PruneError, match="found the power 0"):
        taylor("q", weight, weight, shape, power=0)
    with pytest.raises(PruneError, match="unknown role"):
        taylor("router", weight, weight, shape)
    for role, moments in (("v", (12,)), ("o", (7,)), ("down", (0, 7)), ("down", (1, 1, 7)), ("o", ())):
        with pytest.raises(PruneError, match=r"expected o or down with gate moments"):
            gates(role, torch.zeros(moments), shape)

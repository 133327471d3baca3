"""The methods beside L4Q against plain autograd in float64, and what they keep.

Tolerances: gradients 1e-10 relative; weights while training and afterwards bit for bit.
"""

import itertools

import pytest
import torch
from fakequant_samples import LiveStorages, surrogate_weight
from quant_samples import generator
from torch import nn
from torch.nn import functional as F

from quant import grid
from quant.baselines import FakeQuantLinear, LoRALinear, QALoRALinear
from quant.exceptions import QuantError, ShapeError
from quant.fakequant import L4QLinear
from quant.start import first_codes, packed_into_cells

ROWS, GROUP, GROUPS, TOKENS = 6, 16, 2, 7
COLUMNS = GROUP * GROUPS
CASES = list(itertools.product((2, 3, 4, 8), (0.6, 4.0), ("zero", "half", "trained")))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def steps(weight, bits, shrink=0.6, offset="zero"):
    scale = grid.init_grid(weight, bits, GROUP)[0] * shrink
    return scale, 0.4 * scale * draw(*scale.shape, seed=5).to(scale) if offset == "trained" else None


def fake_quant(bits, shrink, offset, row_chunk=None):
    weight = draw(ROWS, COLUMNS, seed=1)
    grids = steps(weight, bits, shrink, offset)
    module = FakeQuantLinear(weight, None, bits=bits, group_size=GROUP, steps=grids, offset=offset, row_chunk=row_chunk)
    module.weight.requires_grad_()
    return module


def expected_weight(module, offset):
    """W_q by plain autograd of the module's own parameters."""
    none = torch.zeros(ROWS, 1, dtype=torch.float64), torch.zeros(1, COLUMNS, dtype=torch.float64)
    return surrogate_weight(
        module.weight, none[1], none[0], module.scale, module.offset, 1.0, module.bits, half=offset == "half"
    )[0]


def gradients(y, parameters):
    found = torch.autograd.grad(y, parameters, draw(*y.shape, seed=3))
    return y.detach(), found


def same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("bits", "shrink", "offset"), CASES)
def test_lsq_gradients_are_those_of_straight_through_autograd(bits, shrink, offset):
    module, x = fake_quant(bits, shrink, offset, row_chunk=4), draw(TOKENS, COLUMNS).requires_grad_()
    trained = [x, module.weight, module.scale, *([] if module.offset is None else [module.offset])]
    found = gradients(module(x), trained)
    same(found, gradients(x @ expected_weight(module, offset).t(), trained))
    clipped = (found[1][1] == 0).double().mean()
    assert 0.04 < clipped < 0.7 if shrink < 1 else clipped == 0


@pytest.mark.parametrize(("bits", "shrink", "offset"), CASES)
def test_qat_lora_gradients_are_those_of_an_adapter_beside_a_fake_quantised_weight(bits, shrink, offset):
    base = fake_quant(bits, shrink, offset)
    base.weight.requires_grad_(False)
    module, x = LoRALinear(base), draw(TOKENS, COLUMNS).requires_grad_()
    module.set_adapter(draw(3, COLUMNS, seed=6), draw(ROWS, 3, seed=7), 0.7)
    module.double()
    trained = [x, module.task_a, module.task_b, base.scale, *([] if base.offset is None else [base.offset])]
    plain = x @ expected_weight(base, offset).t() + 0.7 * (x @ module.task_a.t()) @ module.task_b.t()
    same(gradients(module(x), trained), gradients(plain, trained))


def qa_lora(bits=3, offset=True, dtype=torch.float64):
    weight = draw(ROWS, COLUMNS, seed=1).to(dtype)
    scale, first = steps(weight, bits, offset="trained")
    first = first if offset else None
    codes = grid.quantize(weight, scale, first, bits)[0]
    bias = draw(ROWS, seed=9).to(dtype)
    module = QALoRALinear(codes, scale, first, bias, bits=bits, rank=3, alpha=0.7, generator=generator(2))
    with torch.no_grad():
        module.lora_b.normal_(generator=generator(4))
    return module, codes, first


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset", [False, True])
def test_qa_lora_is_an_adapter_of_pooled_inputs_and_so_are_its_gradients(bits, offset):
    module, codes, first = qa_lora(bits, offset)
    x = draw(2, TOKENS, COLUMNS).requires_grad_()
    trained = [x, module.lora_a, module.lora_b]
    frozen = grid.dequantize(codes, module.scale, first)
    pooled = x.view(2, TOKENS, GROUPS, GROUP).sum(-1)
    plain = F.linear(x, frozen, module.bias) + 0.7 * (pooled @ module.lora_a.t()) @ module.lora_b.t()
    same(gradients(module(x), trained), gradients(plain, trained))


@pytest.mark.parametrize("offset", ["zero", "half", "trained"])
def test_what_is_trained_is_what_is_stored_to_the_bit(offset):
    weight = draw(ROWS, COLUMNS, seed=1).float()
    fake = FakeQuantLinear(weight, None, bits=3, group_size=GROUP, steps=steps(weight, 3, offset=offset), offset=offset)
    pooled = qa_lora(dtype=torch.float32)[0]
    pooled.bias = None
    for module in (fake, pooled):
        assert torch.equal(module(torch.eye(COLUMNS)).t(), grid.dequantize(*module.quantized()))
        assert torch.equal(module.dequantized(), grid.dequantize(*module.quantized()))
    assert (pooled.quantized()[2] != pooled.first_offset).all()


def test_lsq_keeps_the_weight_and_its_gradient_and_nothing_of_their_size():
    size = 256
    weight = torch.randn(size, size, generator=generator())
    layers = [
        FakeQuantLinear(weight.clone(), None, bits=4, group_size=64, steps=grid.init_grid(weight, 4, 64), row_chunk=16)
        for _ in range(2)
    ]
    for layer in layers:
        layer.weight.requires_grad_()
    x, saved = torch.randn(4, size, requires_grad=True), []
    with LiveStorages([x, *(parameter for layer in layers for parameter in layer.parameters())]) as live:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = layers[1](layers[0](x))
        y.square().sum().backward()
    own = {tensor.data_ptr() for layer in layers for tensor in layer.parameters()}
    assert all(tensor.data_ptr() in own for tensor in saved if tensor.numel() == size * size)
    assert live.peak < 4 * size * size * (len(layers) + 0.7)
    large = [size_ for size_ in live.live() if size_ >= size * size]
    assert large == [4 * size * size] * len(layers)


def test_qa_lora_keeps_sums_of_groups_and_not_the_input():
    module = qa_lora(dtype=torch.float32)[0]
    x, saved = torch.randn(TOKENS, COLUMNS, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    assert not any(tensor.data_ptr() == x.data_ptr() for tensor in saved)
    assert max(tensor.numel() for tensor in saved) < ROWS * COLUMNS / 8


@pytest.mark.parametrize("kind", ["dense", "fake-quantised"])
def test_an_adapter_on_activations_is_the_one_of_a_packed_map(kind):
    weight, bias = draw(ROWS, COLUMNS, seed=1).float(), draw(ROWS, seed=2).float()
    base = nn.Linear(COLUMNS, ROWS)
    base.load_state_dict({"weight": weight, "bias": bias})
    if kind != "dense":
        base = FakeQuantLinear(weight, bias, bits=4, group_size=GROUP, steps=steps(weight, 4))
    module, x = LoRALinear(base), draw(TOKENS, COLUMNS).float()
    assert torch.equal(module(x), base(x))
    module.attach_adapter(3, 6.0, generator(3))
    assert torch.equal(module(x), base(x))
    with torch.no_grad():
        module.task_b.normal_(generator=generator(4))
    torch.testing.assert_close(module(x), base(x) + 2.0 * x @ (module.task_b @ module.task_a).t())
    with pytest.raises(QuantError, match="already attached"):
        module.attach_adapter(3, 6.0, generator(3))


def test_half_precision_activations_keep_fp32_parameters_and_agree_loosely():
    exact = qa_lora(dtype=torch.float32)[0]
    x, found = draw(64, COLUMNS).float(), {}
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype).requires_grad_()
        y = exact(given)
        assert y.dtype == dtype
        found[dtype] = [y, *torch.autograd.grad(y.float().square().sum(), [given, exact.lora_a, exact.lora_b])]
    for whole, half in zip(*found.values(), strict=True):
        assert (half.float() - whole).norm() < 0.02 * whole.norm()


def test_misfitting_operands_are_named():
    module, codes, first = qa_lora(dtype=torch.float32)
    with pytest.raises(ShapeError, match=r"input must be \[..., 32\]"):
        module(torch.ones(2, COLUMNS + 1))
    given = {"bits": 3, "rank": 3, "alpha": 1.0, "generator": generator()}
    for scale, offset in ((module.scale[1:], first), (module.scale, first[1:]), (module.scale.repeat(1, 3), None)):
        with pytest.raises(ShapeError, match="groups dividing 32"):
            QALoRALinear(codes, scale, offset, None, **given)
    with pytest.raises(ShapeError, match="rank"):
        QALoRALinear(codes, module.scale, first, None, **given | {"rank": 0})
    with pytest.raises(ShapeError, match=r"factors must be \[rank, 32\]"):
        LoRALinear(nn.Linear(COLUMNS, ROWS)).set_adapter(torch.ones(2, ROWS), torch.ones(ROWS, 2), 1.0)


@pytest.mark.parametrize("offset", ["zero", "trained"])
def test_each_layer_knows_what_it_trains(offset):
    weight, bias = draw(ROWS, COLUMNS, seed=1).float(), draw(ROWS, seed=2).float()
    grids = {"bits": 4, "group_size": GROUP, "steps": steps(weight, 4, offset=offset), "offset": offset}
    fresh = {"rank": 2, "alpha": 1.0, "generator": generator()}
    factors, rounding = {"lora_a", "lora_b"}, {"scale"} | ({"offset"} if offset == "trained" else set())
    beside, plain = LoRALinear(FakeQuantLinear(weight, bias, **grids)), LoRALinear(nn.Linear(COLUMNS, ROWS))
    for module in (beside, plain):
        module.attach_adapter(2, 1.0, generator())
    for module, names in (
        (L4QLinear(weight, bias, **grids, **fresh), factors | rounding),
        (FakeQuantLinear(weight, bias, **grids), {"weight"} | rounding),
        (beside, {"task_a", "task_b"} | {f"base.{name}" for name in rounding}),
        (plain, {"task_a", "task_b"}),
        (qa_lora(dtype=torch.float32)[0], factors),
    ):
        module.requires_grad_(False).tune()
        assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == names


def test_lsq_of_a_packed_weight_is_refused():
    weight = draw(ROWS, COLUMNS, seed=1).float()
    codes, scale, _ = first_codes(weight, 4, GROUP, method="l4q", offset="zero")
    packed = packed_into_cells(weight, codes, scale, bits=4, half=False, packed_bits=8, factors=None)
    module = FakeQuantLinear(packed, None, bits=4, group_size=GROUP, steps=(scale, None))
    with pytest.raises(QuantError, match="packed weight cannot be trained; keep it dense"):
        module.tune()


def test_a_frozen_weight_of_l4q_still_gets_no_gradient():
    module = L4QLinear(
        draw(ROWS, COLUMNS).float(), None, bits=4, group_size=GROUP, rank=2, alpha=1.0, generator=generator()
    )
    module(torch.ones(2, COLUMNS)).sum().backward()
    assert module.weight.grad is None

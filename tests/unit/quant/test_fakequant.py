import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from quant import grid
from quant.blockwise import quantize
from quant.buffers import packed_buffers
from quant.exceptions import QuantError, ShapeError
from quant.fakequant import MIN_TRAINED_STEP, L4QLinear, l4q_linear
from quant.linear import PackedMatrix
from quant.lowrank import store_factors
from quant.storage import Choice, PackedShape

OUT, IN, GROUP = 24, 32, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(**changes) -> L4QLinear:
    weight = torch.randn(OUT, IN, generator=generator(1)) * 0.05
    arguments = {"bits": 4, "group_size": GROUP, "rank": 4, "alpha": 2.0, "generator": generator(2)} | changes
    return L4QLinear(arguments.pop("weight", weight), arguments.pop("bias", None), **arguments)


def perturb(module: L4QLinear) -> L4QLinear:
    with torch.no_grad():
        module.lora_b.normal_(0, 0.05, generator=generator(3))
        module.scale.mul_(0.7)
        if module.offset is not None:
            module.offset.normal_(0, 0.005, generator=generator(4))
    return module


def test_trainable_parameters_are_the_factors_and_the_steps():
    groups = OUT * IN // GROUP
    for offset, per_group in (("zero", 1), ("half", 1), ("trained", 2)):
        module = layer(offset=offset, bias=torch.ones(OUT))
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert set(trained) == {"lora_a", "lora_b", "scale"} | ({"offset"} if offset == "trained" else set())
        assert sum(p.numel() for p in trained.values()) == 4 * (IN + OUT) + per_group * groups
        assert all(p.dtype == torch.float32 for p in trained.values())


def test_factor_a_is_kaiming_uniform_and_reproducible():
    first, again, other = layer(rank=16), layer(rank=16), layer(rank=16, generator=generator(9))
    assert torch.equal(first.lora_a, again.lora_a)
    assert not torch.equal(first.lora_a, other.lora_a)
    bound = 1 / math.sqrt(IN)
    assert 0.95 * bound < first.lora_a.abs().max() <= bound
    assert (first.lora_b == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_is_kept_by_reference_and_gets_no_gradient(dtype):
    weight = torch.randn(OUT, IN, generator=generator()).to(dtype)
    module = layer(weight=weight)
    assert module.weight.data_ptr() == weight.data_ptr()
    module(torch.ones(2, IN, dtype=dtype)).sum().backward()
    assert module.weight.grad is None
    assert module.scale.grad is not None


def test_step_zero_is_round_to_nearest_whatever_a_and_alpha():
    x = torch.randn(5, IN, generator=generator(5))
    first, second = layer(), layer(alpha=7.0, generator=generator(8))
    scale = grid.init_grid(first.weight, 4, GROUP)[0]
    rounded = grid.dequantize(grid.quantize(first.weight, scale, None, 4)[0], scale, None)
    assert torch.equal(first(x), F.linear(x, rounded))
    assert torch.equal(first(x), second(x))
    first(x).square().sum().backward()
    assert (first.lora_a.grad == 0).all()
    assert (first.lora_b.grad != 0).any()


@pytest.mark.parametrize("row_chunk", [None, 5])
@pytest.mark.parametrize("offset_kind", ["zero", "half", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_integers_are_the_ones_forward_uses(dtype, offset_kind, row_chunk):
    weight = (torch.randn(OUT, IN, generator=generator(1)) * 0.05).to(dtype)
    module = perturb(layer(weight=weight, offset=offset_kind, row_chunk=row_chunk))
    codes, scale, offset = module.quantized()
    assert codes.dtype == torch.int8
    assert (offset is None) == (offset_kind == "zero")
    dense = module.dequantized()
    assert dense.dtype == torch.float32
    assert torch.equal(dense, grid.dequantize(codes, scale, offset))
    # Multiplying by the identity reads the weight of the forward pass out exactly.
    used = module(torch.eye(IN)).t()
    assert torch.equal(used, dense)
    assert not torch.equal(used, layer(weight=weight).dequantized())


def test_quantized_state_does_not_follow_later_training():
    module = layer()
    _, scale, _ = module.quantized()
    before = scale.clone()
    with torch.no_grad():
        module.scale.mul_(2)
    assert torch.equal(scale, before)


def test_warm_start_sets_the_rank_and_the_steps():
    warm = torch.randn(6, IN, generator=generator(3)), torch.randn(OUT, 6, generator=generator(4))
    module = layer(rank=2, alpha=0.5, warm_start=warm)
    assert module.rank == 6
    assert torch.equal(module.lora_a, warm[0])
    assert torch.equal(module.lora_b, warm[1])
    merged = torch.addmm(module.weight, warm[1], warm[0], alpha=0.5)
    assert torch.equal(module.scale, grid.init_grid(merged, 4, GROUP)[0])
    with torch.no_grad():
        module.lora_a.zero_()
    assert (warm[0] != 0).any()
    with pytest.raises(ShapeError, match="warm start"):
        layer(warm_start=(warm[0], warm[1][:, :5]))


def test_merge_happens_before_rounding():
    module = perturb(layer())
    x = torch.randn(5, IN, generator=generator(6))
    base = grid.dequantize(grid.quantize(module.weight, module.scale, None, 4)[0], module.scale, None)
    beside = F.linear(x, base + module.alpha * module.lora_b @ module.lora_a)
    assert (module(x) - beside).abs().max() > 1e-3


def test_steps_never_fall_below_the_floor():
    module = layer(weight=torch.zeros(OUT, IN))
    assert (module.scale == MIN_TRAINED_STEP).all()
    assert torch.finfo(torch.float16).tiny < MIN_TRAINED_STEP
    with torch.no_grad():
        module.scale[0, 0] = -1.0
        module.scale[0, 1] = 0.5
    module.clamp_steps_()
    assert module.scale[0, 0] == MIN_TRAINED_STEP
    assert module.scale[0, 1] == 0.5


def packed(rank=3, transposed=False, factor_dtype="bfloat16") -> PackedMatrix:
    choice = Choice("nf", 4, GROUP, rank, factor_dtype=factor_dtype)
    shape = PackedShape(IN, OUT, choice, transposed)
    weight = torch.randn(OUT, IN, generator=generator(1)) * 0.05
    left, right = torch.randn(OUT, rank, generator=generator(11)), torch.randn(rank, IN, generator=generator(12)) * 0.01
    factors = store_factors(left, right, factor_dtype)
    module = PackedMatrix(shape)
    module.load_state_dict(
        packed_buffers(quantize(weight.t().contiguous() if transposed else weight, choice), factors, shape)
    )
    return module


@pytest.mark.parametrize("row_chunk", [None, 5])
@pytest.mark.parametrize(("rank", "factor_dtype"), [(0, "bfloat16"), (3, "bfloat16"), (3, "int8"), (3, "float32")])
def test_a_packed_weight_gives_the_numbers_of_the_dense_one(rank, factor_dtype, row_chunk):
    frozen = packed(rank, factor_dtype=factor_dtype)
    dense = frozen.dequantized()
    modules = [perturb(layer(weight=weight, row_chunk=row_chunk)) for weight in (frozen, dense)]
    x = torch.randn(5, IN, generator=generator(5), requires_grad=True)
    found = []
    for module in modules:
        x.grad = None
        y = module(x)
        y.square().sum().backward()
        grads = [parameter.grad for parameter in (module.lora_a, module.lora_b, module.scale)]
        found.append([y, x.grad, *grads, module.dequantized(), module.scale])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(modules[0](torch.eye(IN)).t(), modules[0].dequantized())


def test_a_packed_weight_is_no_parameter_and_is_kept_by_reference():
    frozen = packed()
    module = layer(weight=frozen)
    assert {name for name, _ in module.named_parameters()} == {"lora_a", "lora_b", "scale"}
    assert module.weight is frozen
    assert {name for name in module.state_dict() if name.startswith("weight.")} == {
        f"weight.{n}" for n in frozen.frozen()
    }
    with pytest.raises(ShapeError, match="not transposed"):
        layer(weight=packed(transposed=True))


def test_two_offsets_are_refused():
    module = layer(offset="trained")
    operands = module.weight, module.lora_a, module.lora_b, module.scale, module.offset
    with pytest.raises(QuantError, match="half a step"):
        l4q_linear(torch.ones(2, IN), *operands, alpha=1.0, bits=4, group_size=GROUP, half=True)


def test_leading_dimensions_bias_and_strides_do_not_matter():
    bias = torch.randn(OUT, generator=generator(7))
    module = perturb(layer(bias=bias))
    x = torch.randn(3, IN, 4, generator=generator(8)).transpose(1, 2)
    expected = F.linear(x, module.dequantized(), bias)
    y = module(x)
    assert y.shape == (3, 4, OUT)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module(x[0, 0]), expected[0, 0], rtol=1e-5, atol=1e-6)
    y.backward(torch.ones(1, 1, 1).expand(3, 4, OUT))


@pytest.mark.parametrize("row_chunk", [None, 7])
def test_checkpointing_gives_the_same_gradients(row_chunk):
    def gradients(wrap):
        module = perturb(layer(row_chunk=row_chunk))
        x = torch.randn(6, IN, generator=generator(9)).requires_grad_()
        wrap(module, x).square().sum().backward()
        return [x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]

    plain = gradients(lambda module, x: module(x))
    again = gradients(lambda module, x: checkpoint(module, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_half_precision_activations_keep_fp32_steps_and_agree_loosely():
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        module = perturb(layer(offset="trained", row_chunk=7))
        x = torch.randn(64, IN, generator=generator(9)).to(dtype).requires_grad_()
        y = module(x)
        y.sum().backward()
        assert y.dtype == dtype
        assert x.grad.dtype == dtype
        gradients[dtype] = [x.grad.float(), *(p.grad for p in module.parameters() if p.requires_grad)]
    for exact, half in zip(gradients[torch.float32], gradients[torch.bfloat16], strict=True):
        assert half.dtype == torch.float32
        assert (half - exact).norm() < 0.02 * exact.norm()


def test_autocast_changes_the_activations_and_not_the_integers():
    module = perturb(layer())
    expected = module.quantized()[0]
    x = torch.eye(IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.quantized()[0], expected)
        y = module(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.t(), module.dequantized().bfloat16())
    assert module.lora_b.grad.dtype == torch.float32


def test_frozen_parts_get_no_gradient():
    module = perturb(layer())
    module.lora_a.requires_grad_(False)
    x = torch.ones(2, IN)
    module(x).sum().backward()
    assert module.lora_a.grad is None
    assert x.grad is None
    assert module.lora_b.grad is not None


def test_misfitting_operands_are_named():
    module = layer()
    with pytest.raises(ShapeError, match=r"input must be \[..., 32\]"):
        module(torch.ones(2, IN + 1))
    with pytest.raises(ShapeError, match="group_size"):
        layer(group_size=5)
    with pytest.raises(ShapeError, match="rank"):
        layer(rank=0)
    with pytest.raises(ShapeError, match="row_chunk"):
        layer(row_chunk=0)(torch.ones(2, IN))
    good = {"alpha": 1.0, "bits": 4, "group_size": GROUP}
    a, b, s, x = module.lora_a, module.lora_b, module.scale, torch.ones(2, IN)
    for name, operands in {
        "lora_a": (a[:, 1:], b, s, None),
        "lora_b": (a, b[1:], s, None),
        "scale": (a, b, s[:, 1:], None),
        "offset": (a, b, s, s[1:]),
    }.items():
        with pytest.raises(ShapeError, match=name):
            l4q_linear(x, module.weight, *operands, **good)
    with pytest.raises(QuantError, match="bf16"):
        l4q_linear(x, module.weight, a, b, s.bfloat16(), None, **good)

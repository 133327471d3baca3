import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from quant import blockwise
from quant.buffers import packed_buffers, slice_rows
from quant.exceptions import QuantError, ShapeError
from quant.linear import PackedLinear
from quant.lowrank import store_factors
from quant.storage import Choice, PackedShape

IN, OUT, RANK = 64, 96, 5
CHOICES = [
    Choice("nf", 2, 16, RANK),
    Choice("nf", 3, 32, RANK),
    Choice("nf", 4, 16, RANK, scale_bits=4),
    Choice("nf", 8, 32, RANK),
    Choice("nf", 3, 16, RANK, scale_bits=3, superblock=8),
    Choice("lloyd", 3, 32, RANK, factor_dtype="int8"),
    Choice("int", 4, 32, RANK, 16, "float16"),
    Choice("int", 2, 16, RANK, 8, factor_dtype="float32"),
    Choice("uint", 4, 32, RANK, 16, "float16"),
    Choice("uint", 3, 16, RANK, 4, factor_dtype="int8"),
    Choice("lloyd", 2, 16, RANK, 32, "float32", factor_dtype="float16"),
]
SHAPES = [(choice, transposed) for choice in CHOICES for transposed in (False, True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def filled(choice: Choice, transposed: bool, *, bias: bool = False) -> PackedLinear:
    """A packed map of a random weight, written the way a loader writes it: by state dict."""
    shape = PackedShape(IN, OUT, choice, transposed, bias)
    module = PackedLinear(shape)
    left, right = 0.1 * draw(OUT, choice.rank, seed=2), draw(choice.rank, IN, seed=3)
    factors = store_factors(left, right, choice.factor_dtype)
    module.load_state_dict(
        packed_buffers(stored_weight(choice, transposed), factors, shape, draw(OUT, seed=4) if bias else None)
    )
    return module


def stored_weight(choice: Choice, transposed: bool) -> blockwise.BlockQuantized:
    weight = draw(OUT, IN, seed=1)
    return blockwise.quantize(weight.t().contiguous() if transposed else weight, choice)


def dense_weight(choice: Choice, transposed: bool) -> torch.Tensor:
    stored = blockwise.rebuild(stored_weight(choice, transposed), choice)
    return stored.t() if transposed else stored


def lowrank(module: PackedLinear) -> torch.Tensor:
    """fp64 L1 L2 of the stored factors."""
    left = module.lowrank_left.double()
    if module.shape.choice.factor_dtype == "int8":
        left = left * module.lowrank_scale.double()
    return left @ module.lowrank_right.double()


@pytest.mark.parametrize(("choice", "transposed"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_buffers_are_exactly_the_spec(choice, transposed, bias):
    module = filled(choice, transposed, bias=bias)
    found = {name: (str(b.dtype).removeprefix("torch."), tuple(b.shape)) for name, b in module.named_buffers()}
    assert found == module.shape.buffers()
    assert ("bias" in found) == bias
    assert set(module.state_dict()) == set(found)
    assert not list(module.parameters())


@pytest.mark.parametrize(("choice", "transposed"), SHAPES)
def test_dequantized_is_the_stored_matrix_plus_the_factors(choice, transposed):
    module = filled(choice, transposed)
    expected = dense_weight(choice, transposed)
    assert torch.equal(module.dequantized(include_lowrank=False), expected)
    whole = expected.double() + lowrank(module)
    found = module.dequantized()
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, whole.float())


@pytest.mark.parametrize(("choice", "transposed"), SHAPES)
@pytest.mark.parametrize("include_lowrank", [False, True])
def test_slicing_stored_rows_slices_the_weight_bit_for_bit(choice, transposed, include_lowrank):
    full = filled(choice, transposed)
    axis_size = IN if transposed else OUT
    keep = torch.randperm(axis_size, generator=generator(5))[: axis_size // 2 - 3].sort().values
    sizes = (len(keep), OUT) if transposed else (IN, len(keep))
    small = PackedLinear(PackedShape(*sizes, choice.sliced(), transposed))
    small.load_state_dict(slice_rows(full.state_dict(), full.shape, keep))
    whole = full.dequantized(include_lowrank)
    expected = whole[:, keep] if transposed else whole[keep]
    assert torch.equal(small.dequantized(include_lowrank), expected)


@pytest.mark.parametrize(("choice", "transposed"), SHAPES)
@pytest.mark.parametrize("chunk_elements", [1 << 20, 7 * OUT])
def test_forward_and_gradients_match_a_dense_float64_twin(choice, transposed, chunk_elements, monkeypatch):
    monkeypatch.setattr("quant.linear._CHUNK", chunk_elements)
    module = filled(choice, transposed, bias=True)
    module.attach_adapter(3, 6.0, generator(6))
    with torch.no_grad():
        module.task_b.copy_(draw(OUT, 3, seed=7))
    twin_a, twin_b = (p.detach().double().requires_grad_() for p in (module.task_a, module.task_b))
    x = draw(2, 7, IN, seed=8)
    grad_y = draw(2, 7, OUT, seed=9)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 2e-2)):
        module.zero_grad()
        twin_a.grad = twin_b.grad = None
        ours = x.to(dtype, copy=True).requires_grad_()
        twin = x.double().requires_grad_()
        weight = dense_weight(choice, transposed).double()
        weight = weight + lowrank(module) + 2.0 * twin_b @ twin_a
        y, expected = module(ours), F.linear(twin, weight, module.bias.double())
        assert y.dtype == dtype
        y.backward(grad_y.to(dtype))
        expected.backward(grad_y.double())
        pairs = [(y, expected), (ours.grad, twin.grad)]
        task_tolerance = max(tolerance, 1e-6)  # fp32 gradients of fp32 parameters
        pairs += [(module.task_a.grad, twin_a.grad), (module.task_b.grad, twin_b.grad)]
        for (found, wanted), limit in zip(pairs, [tolerance, tolerance, task_tolerance, task_tolerance], strict=True):
            assert (found.double() - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_references_to_buffers_and_no_weight(transposed, dtype):
    module = filled(CHOICES[1], transposed)
    module.attach_adapter(3, 6.0, generator(6))
    x = draw(4, IN).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x)
    own = {t.untyped_storage().data_ptr() for t in (x, *module.buffers(), *module.parameters())}
    foreign = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert len(saved) > len(foreign)
    # Only the adapter's hidden state and its factors in half precision may be new.
    assert all(t.numel() <= 3 * max(IN, OUT) for t in foreign)
    y.sum().backward()
    assert x.grad is not None


def test_a_frozen_map_does_not_keep_its_input():
    module = filled(CHOICES[1], False)
    x = draw(4, IN).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        module(x)
    assert saved
    assert x.data_ptr() not in saved


def test_a_new_adapter_adds_nothing_and_is_reproducible():
    module, again = filled(CHOICES[2], False), filled(CHOICES[2], False)
    x = draw(3, IN)
    before = module(x)
    for each in (module, again):
        each.attach_adapter(4, 8.0, generator(11))
    assert torch.equal(module(x), before)
    assert torch.equal(module.task_a, again.task_a)
    assert module.task_scale == 2.0
    bound = 1 / math.sqrt(IN)
    assert 0.9 * bound < module.task_a.abs().max() <= bound
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["task_a", "task_b"]
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    with pytest.raises(QuantError, match="already attached"):
        module.attach_adapter(4, 8.0, generator(11))
    with pytest.raises(ShapeError, match="rank"):
        again.attach_adapter(0, 8.0, generator(11))


def test_the_adapter_stays_fp32_under_another_default_dtype():
    module = filled(CHOICES[2], False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        module.attach_adapter(4, 8.0, generator())
        assert module.dequantized().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_autocast_computes_in_its_dtype_with_exact_levels():
    module = filled(replace(CHOICES[2], rank=0), False)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.eye(IN))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.t(), module.dequantized().bfloat16())


def test_rank_zero_leaves_the_quantised_part():
    module = filled(replace(CHOICES[1], rank=0), True)
    assert torch.equal(module.dequantized(), module.dequantized(include_lowrank=False))
    assert torch.equal(module(torch.eye(IN)).t(), module.dequantized())


def test_maps_can_be_planned_on_the_meta_device():
    module = PackedLinear(PackedShape(IN, OUT, CHOICES[0], transposed=True, bias=True), device="meta")
    assert all(b.is_meta for b in module.buffers())


@pytest.mark.parametrize("choice", CHOICES)
def test_casting_what_defines_the_weights_is_refused(choice):
    module = filled(choice, False)
    x = draw(2, IN)
    assert torch.equal(module.to("cpu")(x), module(x))
    with pytest.raises(QuantError, match=r"cast to torch\.bfloat16, but a packed map keeps torch\.float32"):
        module.bfloat16()(x)


@pytest.mark.parametrize("name", ["scale", "levels", "lowrank_scale"])
def test_each_of_them_is_named(name):
    module = filled(Choice("lloyd", 3, 32, RANK, 16, "float16", factor_dtype="int8"), False)
    setattr(module, name, module.get_buffer(name).double())
    with pytest.raises(QuantError, match=f"^{name} was cast to torch.float64"):
        module(draw(2, IN))


def test_bad_requests_are_named():
    with pytest.raises(ShapeError, match="blocks of 48"):
        PackedLinear(PackedShape(IN, OUT, Choice("nf", 4, 48, 2), transposed=False))
    with pytest.raises(ShapeError, match=r"input must be \[..., 64\]"):
        filled(CHOICES[0], False)(torch.ones(2, OUT))


@pytest.mark.parametrize("choice", [CHOICES[2], CHOICES[5]], ids=lambda choice: choice.name)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_low_rank_part_trained_in_place_is_the_map_and_gets_the_gradients_of_plain_autograd(transposed, choice):
    module, plain = filled(choice, transposed, bias=True), filled(choice, transposed, bias=True)
    left, right = (factor.double().requires_grad_() for factor in plain.factors())
    module.train_factors()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"task_a", "task_b"}
    x = draw(3, IN)
    given = x.double().requires_grad_()
    weight = plain.dequantized(include_lowrank=False).double() + left @ right
    expected = F.linear(given, weight, plain.bias.double())
    x.requires_grad_()
    found = module(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    weights = draw(*found.shape)
    ours = torch.autograd.grad(found, [x, module.task_a, module.task_b], weights)
    theirs = torch.autograd.grad(expected, [given, right, left], weights.double())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.dequantized(), plain.dequantized(include_lowrank=False))
    with pytest.raises(QuantError, match="already attached"):
        module.train_factors()

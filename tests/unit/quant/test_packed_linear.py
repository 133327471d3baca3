import math

import pytest
import torch
from torch.nn import functional as F

from quant import blockwise, pack, storage
from quant.blockwise import BlockFormat
from quant.exceptions import QuantError, ShapeError
from quant.linear import PackedLinear, buffer_spec

IN, OUT, RANK = 64, 96, 5
FORMATS = [BlockFormat(2, 16), BlockFormat(3, 32), BlockFormat(4, 16, scale_bits=4), BlockFormat(8, 32)]
SHAPES = [(fmt, transposed) for fmt in FORMATS for transposed in (False, True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def filled(fmt: BlockFormat, transposed: bool, *, bias: bool = False, rank: int = RANK) -> PackedLinear:
    """A packed map of a random weight, written the way a loader writes it: by state dict."""
    module = PackedLinear(in_features=IN, out_features=OUT, fmt=fmt, rank=rank, transposed=transposed, bias=bias)
    weight = draw(OUT, IN, seed=1)
    found = blockwise.quantize(weight.t().contiguous() if transposed else weight, fmt)
    scale_codes = found.scale_codes if fmt.scale_bits == 8 else pack.pack(found.scale_codes, fmt.scale_bits)
    state = {
        "codes": pack.pack(found.codes, fmt.bits),
        "scale_codes": scale_codes,
        "scale_max": found.scale_max,
        "scale_offset": found.scale_offset,
        "lowrank_left": (0.1 * draw(OUT, rank, seed=2)).bfloat16(),
        "lowrank_right": draw(rank, IN, seed=3).bfloat16(),
    }
    if bias:
        state["bias"] = draw(OUT, seed=4)
    module.load_state_dict(state)
    return module


def dense_weight(fmt: BlockFormat, transposed: bool) -> torch.Tensor:
    weight = draw(OUT, IN, seed=1)
    found = blockwise.quantize(weight.t().contiguous() if transposed else weight, fmt)
    scale = blockwise.scales(found.scale_codes, found.scale_max, found.scale_offset, fmt)
    stored = blockwise.dequantize(found.codes, scale, fmt.bits)
    return stored.t() if transposed else stored


@pytest.mark.parametrize(("fmt", "transposed"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_buffers_are_exactly_the_spec(fmt, transposed, bias):
    module = filled(fmt, transposed, bias=bias)
    found = {name: (b.dtype, tuple(b.shape)) for name, b in module.named_buffers()}
    assert found == buffer_spec(IN, OUT, fmt, RANK, transposed, torch.bfloat16, bias)
    rows, columns = (IN, OUT) if transposed else (OUT, IN)
    assert found["codes"] == (torch.int32, (rows, storage.packed_columns(columns, fmt.bits)))
    assert found["scale_max"] == (torch.bfloat16, (rows,))
    assert found["lowrank_left"] == (torch.bfloat16, (OUT, RANK))
    assert found["lowrank_right"] == (torch.bfloat16, (RANK, IN))
    assert ("bias" in found) == bias
    assert set(module.state_dict()) == set(found)
    assert not list(module.parameters())


@pytest.mark.parametrize(("fmt", "transposed"), SHAPES)
def test_dequantized_is_the_stored_matrix_plus_the_factors(fmt, transposed):
    module = filled(fmt, transposed)
    expected = dense_weight(fmt, transposed)
    assert torch.equal(module.dequantized(include_lowrank=False), expected)
    whole = expected.double() + module.lowrank_left.double() @ module.lowrank_right.double()
    found = module.dequantized()
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    assert torch.equal(found, whole.float())


@pytest.mark.parametrize(("fmt", "transposed"), SHAPES)
@pytest.mark.parametrize("include_lowrank", [False, True])
def test_slicing_stored_rows_slices_the_weight_bit_for_bit(fmt, transposed, include_lowrank):
    full = filled(fmt, transposed)
    axis_size = IN if transposed else OUT
    keep = torch.randperm(axis_size, generator=generator(5))[: axis_size // 2 - 3].sort().values
    sizes = {"in_features": IN, "out_features": OUT} | {"in_features" if transposed else "out_features": len(keep)}
    small = PackedLinear(**sizes, fmt=fmt, rank=RANK, transposed=transposed, bias=False)
    state = {k: v[keep] if k in ("codes", "scale_codes", "scale_max") else v for k, v in full.state_dict().items()}
    if transposed:
        state["lowrank_right"] = state["lowrank_right"][:, keep]
    else:
        state["lowrank_left"] = state["lowrank_left"][keep]
    small.load_state_dict(state)
    whole = full.dequantized(include_lowrank)
    expected = whole[:, keep] if transposed else whole[keep]
    assert torch.equal(small.dequantized(include_lowrank), expected)


@pytest.mark.parametrize(("fmt", "transposed"), SHAPES)
@pytest.mark.parametrize("chunk_elements", [1 << 20, 7 * OUT])
def test_forward_and_gradients_match_a_dense_float64_twin(fmt, transposed, chunk_elements, monkeypatch):
    monkeypatch.setattr("quant.rebuild.CHUNK_ELEMENTS", chunk_elements)
    module = filled(fmt, transposed, bias=True)
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
        weight = dense_weight(fmt, transposed).double()
        weight = weight + module.lowrank_left.double() @ module.lowrank_right.double() + 2.0 * twin_b @ twin_a
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
    module = filled(FORMATS[1], transposed)
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
    module = filled(FORMATS[1], False)
    x = draw(4, IN).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        module(x)
    assert saved
    assert x.data_ptr() not in saved


def test_a_new_adapter_adds_nothing_and_is_reproducible():
    module, again = filled(FORMATS[2], False), filled(FORMATS[2], False)
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
    module = filled(FORMATS[2], False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        module.attach_adapter(4, 8.0, generator())
        assert module.dequantized().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_autocast_computes_in_its_dtype_with_exact_levels():
    module = filled(FORMATS[2], False, rank=0)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.eye(IN))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.t(), module.dequantized().bfloat16())


def test_rank_zero_leaves_the_quantised_part():
    module = filled(FORMATS[1], True, rank=0)
    assert torch.equal(module.dequantized(), module.dequantized(include_lowrank=False))
    assert torch.equal(module(torch.eye(IN)).t(), module.dequantized())


def test_maps_can_be_planned_on_the_meta_device():
    module = PackedLinear(
        in_features=IN, out_features=OUT, fmt=FORMATS[0], rank=2, transposed=True, bias=True, device="meta"
    )
    assert all(b.is_meta for b in module.buffers())


def test_casting_the_scales_is_refused_before_it_changes_the_weights():
    module = filled(FORMATS[0], False)
    x = draw(2, IN)
    assert torch.equal(module.to("cpu")(x), module(x))
    with pytest.raises(QuantError, match=r"cast to torch\.bfloat16"):
        module.bfloat16()(x)


def test_bad_requests_are_named():
    good = {"in_features": IN, "out_features": OUT, "rank": 2, "transposed": False}
    with pytest.raises(ShapeError, match="blocks of 48"):
        buffer_spec(**good, fmt=BlockFormat(4, 48))
    with pytest.raises(QuantError, match="superblock"):
        buffer_spec(**good, fmt=BlockFormat(4, 16, superblock=8))
    with pytest.raises(QuantError, match="rank"):
        buffer_spec(**good | {"rank": -1}, fmt=BlockFormat(4, 16))
    with pytest.raises(ShapeError, match=r"input must be \[..., 64\]"):
        filled(FORMATS[0], False)(torch.ones(2, OUT))

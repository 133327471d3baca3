"""What an L4Q layer keeps and needs, dense or packed: counted in live bytes and saved tensors."""

import pytest
import torch
from fakequant_samples import LiveStorages
from quant_samples import generator

from quant.blockwise import quantize
from quant.buffers import packed_buffers
from quant.fakequant import L4QLinear
from quant.linear import PackedMatrix
from quant.lowrank import store_factors
from quant.storage import Choice, PackedShape


def big_layer(dtype=torch.float32, size=256, row_chunk=16, seed=0, packed=False):
    weight = torch.randn(size, size, generator=generator(seed)).to(dtype)
    return L4QLinear(
        packed_weight(weight) if packed else weight,
        None,
        bits=4,
        group_size=64,
        rank=4,
        alpha=1.0,
        generator=generator(1),
        offset="trained",
        row_chunk=row_chunk,
    )


def packed_weight(weight):
    choice = Choice("nf", 4, 64, 8)
    shape = PackedShape(*weight.t().shape, choice, transposed=False)
    factors = store_factors(weight[:, :8] * 0.01, weight[:8], "bfloat16")
    module = PackedMatrix(shape)
    module.load_state_dict(packed_buffers(quantize(weight, choice), factors, shape))
    return module


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("row_chunk", [None, 16])
def test_forward_saves_the_input_and_references_only(dtype, packed, row_chunk):
    module = big_layer(dtype, row_chunk=row_chunk, packed=packed)
    x = torch.randn(8, 256).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module(x)
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, *module.state_dict().values())}
    assert saved
    if packed:
        assert sum(own.values()) < 0.35 * 4 * 256 * 256
    assert all(t.untyped_storage().data_ptr() in own for t in saved)
    assert sum(t.untyped_storage().data_ptr() == x.data_ptr() for t in saved) == 1


@pytest.mark.parametrize("row_chunk", [None, 16])
def test_nothing_but_the_output_outlives_forward(row_chunk):
    module = big_layer(row_chunk=row_chunk)
    x = torch.randn(8, 256, requires_grad=True)
    with LiveStorages([x, *module.parameters()]) as live:
        y = module(x)
    assert sum(live.live()) == y.untyped_storage().nbytes()


@pytest.mark.parametrize("packed", [False, True])
def test_backward_needs_a_few_chunks_and_leaves_nothing_of_weight_size(packed):
    size, chunk, tokens = 256, 16, 4
    first, second = (big_layer(seed=seed, row_chunk=chunk, packed=packed) for seed in (0, 1))
    x = torch.randn(tokens, size, requires_grad=True)
    middle = first(x)
    loss = second(middle).square().sum()
    alive_between = []
    with LiveStorages([*first.state_dict().values(), *second.state_dict().values()]) as live:
        middle.register_hook(lambda grad: alive_between.append(max(live.live())))
        loss.backward()
    weight_bytes, chunk_bytes = 4 * size * size, 4 * chunk * size
    assert len(alive_between) == 1
    assert alive_between[0] < weight_bytes / 8
    parameter_bytes = 4 * sum(p.numel() for m in (first, second) for p in m.parameters() if p.requires_grad)
    activation_bytes = 4 * tokens * size
    beside = 8 * 8 * 2 * size + 4 * 4 * size if packed else 0
    assert live.peak <= 9 * chunk_bytes + parameter_bytes + beside + 8 * activation_bytes
    assert live.peak < weight_bytes
    assert max(live.live()) < weight_bytes / 8
    assert all(parameter.grad is None for module in (first, second) for parameter in frozen_of(module))
    assert first.lora_b.grad is not None


def frozen_of(module):
    return [parameter for parameter in module.parameters() if not parameter.requires_grad]


def test_the_layer_never_projects_activations_onto_the_factors():
    module = big_layer()
    x = torch.randn(11, 256, requires_grad=True)
    with LiveStorages(module.parameters()) as live:
        module(x).sum().backward()
    assert (11, 256) in live.shapes
    assert (11, 4) not in live.shapes

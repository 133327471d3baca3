"""Packed embeddings and the head tied to one, against PackedLinear and float64 twins."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant.blockwise import quantize
from quant.buffers import packed_buffers
from quant.decompose import decompose
from quant.embedding import PackedEmbedding, TiedHead, quantize_rows
from quant.exceptions import NonFiniteError, QuantError
from quant.linear import PackedLinear
from quant.storage import Choice, PackedShape

VOCAB, HIDDEN = 37, 48
INT8 = PackedShape(HIDDEN, VOCAB, Choice("int", 8, 24, 0, 16, "float16"), transposed=False)
IDS = torch.tensor([[3, 3, 0], [36, 7, 3]])


def table() -> torch.Tensor:
    weight = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.02
    weight[5] = 0  # a padding row
    return weight


def filled(kind: type, shape: PackedShape = INT8, **options):
    module = kind(shape, **options)
    module.load_state_dict(quantize_rows(table(), shape))
    return module


def embedding(dtype: torch.dtype = torch.float32, **options) -> PackedEmbedding:
    return filled(PackedEmbedding, dtype=dtype, **options)


@pytest.mark.parametrize("chunk_rows", [1, 5, VOCAB])
def test_quantising_by_chunks_is_quantising_at_once(chunk_rows, monkeypatch):
    whole = quantize(table(), INT8.choice)
    nothing = torch.empty(VOCAB, 0, dtype=torch.bfloat16), torch.empty(0, HIDDEN, dtype=torch.bfloat16), None
    expected = packed_buffers(whole, nothing, INT8)
    monkeypatch.setattr("quant.rebuild.CHUNK_ELEMENTS", chunk_rows * HIDDEN)
    found = quantize_rows(table(), INT8)
    assert list(found) == list(INT8.buffers())
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


def test_codes_are_the_nearest_and_half_precision_tables_are_read_as_they_are():
    weight = table()
    dense = filled(PackedLinear).dequantized()
    scale = filled(PackedLinear).scale.double().repeat_interleave(24, dim=1)
    # A scale rounded down to float16 may clip by that much.
    assert ((dense - weight).double().abs() <= scale * (0.5 + 128 * 2**-11)).all()
    assert (dense - weight).norm() < 0.01 * weight.norm()
    assert torch.equal(dense[5], torch.zeros(HIDDEN))
    half = quantize_rows(weight.bfloat16(), INT8)
    assert all(
        torch.equal(tensor, half[name]) for name, tensor in quantize_rows(weight.bfloat16().float(), INT8).items()
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e8])
def test_what_no_scale_can_hold_is_an_error(bad):
    weight = table()
    weight[VOCAB - 1, 3] = bad
    with pytest.raises(NonFiniteError):
        quantize_rows(weight, INT8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 48**0.5])
def test_rows_are_those_of_the_dense_table_bit_for_bit(dtype, factor):
    dense = filled(PackedLinear).dequantized().to(dtype)
    found = embedding(dtype, factor=factor)(IDS)
    expected = F.embedding(IDS, dense)
    if factor != 1:
        expected = expected * torch.tensor(factor, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert torch.equal(embedding(dtype, factor=factor)(IDS.int()), expected)
    assert embedding(dtype)(IDS[:0]).shape == (0, 3, HIDDEN)


@pytest.mark.parametrize(
    "choice",
    [
        Choice("nf", 4, 16, 3),
        Choice("uint", 3, 16, 2, 16, "float16", factor_dtype="int8"),
        Choice("lloyd", 2, 16, 0, superblock=VOCAB),
    ],
)
def test_every_choice_of_an_untransposed_map_can_be_looked_up(choice):
    shape = PackedShape(HIDDEN, VOCAB, choice, transposed=False)
    result = decompose(table(), choice, generator=torch.Generator().manual_seed(0), max_iterations=1)
    buffers = packed_buffers(result.quantized, (result.left, result.right, result.factor_scale), shape)
    linear, looked_up = PackedLinear(shape), PackedEmbedding(shape, dtype=torch.float32)
    for module in (linear, looked_up):
        module.load_state_dict(buffers)
    assert torch.equal(looked_up(IDS), linear.dequantized()[IDS])


def test_only_the_rows_asked_for_are_made(monkeypatch):
    seen = []

    def counted(words, *rest):
        seen.append(len(words))
        return original(words, *rest)

    from quant.linear import dequantize_packed as original

    monkeypatch.setattr("quant.linear.dequantize_packed", counted)
    embedding()(IDS)
    assert sum(seen) == IDS.numel()


@pytest.mark.parametrize("index", [VOCAB, -1])
def test_an_index_outside_the_table_is_an_error(index):
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        embedding()(torch.tensor([0, index]))


def test_bad_requests_are_named():
    with pytest.raises(QuantError, match="not transposed"):
        PackedEmbedding(replace(INT8, transposed=True, choice=replace(INT8.choice, block_size=37)), dtype=torch.float32)
    with pytest.raises(QuantError, match="levels was cast"):
        embedding().half()(IDS)


def test_a_tied_head_is_the_linear_map_with_the_same_buffers():
    owner, twin = embedding(), filled(PackedLinear)
    head = TiedHead(owner)
    dense = twin.dequantized().double()
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        again = x.detach().clone().requires_grad_()
        found, expected = head(x), twin(again)
        assert torch.equal(found, expected)
        exact = x.detach().double() @ dense.t()
        assert (found.double() - exact).norm() <= tolerance * exact.norm()
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        found.backward(grad)
        expected.backward(grad)
        assert torch.equal(x.grad, again.grad)
        back = grad.double() @ dense
        assert (x.grad.double() - back).norm() <= tolerance * back.norm()


def test_there_is_one_copy_wherever_the_model_goes():
    owner = embedding()
    model = nn.ModuleDict({"embed": owner, "head": TiedHead(owner)})
    assert set(model.state_dict()) == {f"embed.{name}" for name in INT8.buffers()}
    for each in (copy.deepcopy(model), model.to("meta")):
        assert each["head"].qweight is each["embed"].codes
    assert owner.codes.is_meta

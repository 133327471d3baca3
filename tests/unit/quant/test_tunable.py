"""Codes stay, everything else moves: values, gradients against autograd, and what is stored."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant.buffers import packed_buffers
from quant.decompose import decompose
from quant.exceptions import ShapeError
from quant.linear import PackedLinear
from quant.pack import unpack
from quant.rebuild import CHUNK_ELEMENTS
from quant.storage import Choice, PackedShape
from quant.tunable import TunableLinear

CHOICES = (
    Choice("lloyd", 3, 32, 4, factor_dtype="int8"),
    Choice("lloyd", 2, 16, 0),
    Choice("nf", 4, 32, 3),
    Choice("uint", 3, 32, 2, 16, "float16"),
    Choice("int", 8, 64, 0, 32, "float32"),
)
BOTH = pytest.mark.parametrize("transposed", [False, True])
ALL = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.name)


def made(choice: Choice, transposed: bool, bias: bool = True) -> tuple[PackedShape, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    shape = PackedShape(128, 64, choice, transposed, bias)
    found = decompose(weight, choice, generator=generator, transposed=transposed)
    factors = (found.left, found.right, found.factor_scale)
    return shape, packed_buffers(
        found.quantized, factors, shape, torch.randn(64, generator=generator) if bias else None
    )


def dense(module: TunableLinear) -> Tensor:
    """The weight as plain torch operations, differentiable in every change."""
    shape, block = module.shape, module.shape.choice.block_size
    steps = (module.levels + module.level_change)[unpack(module.codes, shape.choice.bits, shape.columns).long()]
    if module.zero is not None:
        steps = steps - module.zero.float().repeat_interleave(block, 1)
    stored = steps * (module.scale * (1 + module.scale_change)).repeat_interleave(block, 1)
    left, right = (
        value + value.square().mean().sqrt() * change if value.numel() else value
        for value, change in ((module.left, module.left_change), (module.right, module.right_change))
    )
    return (stored.T if shape.transposed else stored) + left @ right


@ALL
@BOTH
def test_starts_as_the_packed_map(choice: Choice, transposed: bool) -> None:
    shape, buffers = made(choice, transposed)
    packed = PackedLinear(shape)
    packed.load_state_dict(buffers)
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(TunableLinear(shape, buffers)(x), packed(x), rtol=1e-5, atol=1e-4)


@ALL
@BOTH
def test_gradients_are_those_of_autograd(choice: Choice, transposed: bool) -> None:
    module = TunableLinear(*made(choice, transposed))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(7, 128, generator=generator, requires_grad=True)
    grad = torch.randn(7, 64, generator=generator)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    inputs = [x, *trained.values()]
    found = torch.autograd.grad(module(x), inputs, grad)
    expected = torch.autograd.grad(x @ dense(module).T + module.bias, inputs, grad)
    for name, one, other in zip(["x", *trained], found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)


@BOTH
def test_gradients_of_a_map_that_takes_several_chunks(transposed: bool) -> None:
    shape = PackedShape(1024, 1152, Choice("lloyd", 2, 64, 0), transposed)
    assert shape.rows * shape.columns > CHUNK_ELEMENTS
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(1152, 1024, generator=generator)
    found = decompose(weight, shape.choice, generator=generator, transposed=transposed)
    module = TunableLinear(shape, packed_buffers(found.quantized, (found.left, found.right, None), shape))
    x = torch.randn(2, 1024, generator=generator, requires_grad=True)
    grad = torch.randn(2, 1152, generator=generator)
    inputs = [x, module.scale_change, module.level_change]
    expected = torch.autograd.grad(x @ dense(module).T, inputs, grad)
    for one, other in zip(torch.autograd.grad(module(x), inputs, grad), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


@BOTH
def test_integer_grids_keep_their_levels_and_rank_zero_has_no_factors(transposed: bool) -> None:
    def trained(choice: Choice) -> set[str]:
        module = TunableLinear(*made(choice, transposed))
        return {name for name, parameter in module.named_parameters() if parameter.requires_grad}

    assert trained(CHOICES[0]) == {"scale_change", "level_change", "left_change", "right_change"}
    assert trained(CHOICES[1]) == {"scale_change", "level_change"}
    assert trained(CHOICES[3]) == {"scale_change", "left_change", "right_change"}
    assert trained(CHOICES[4]) == {"scale_change"}


@ALL
@BOTH
def test_what_is_stored_is_what_was_tuned(choice: Choice, transposed: bool) -> None:
    shape, buffers = made(choice, transposed)
    module = TunableLinear(shape, buffers)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (value for value in module.parameters() if value.requires_grad):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    packed = PackedLinear(shape)
    packed.load_state_dict(module.packed())
    error = (packed.dequantized() - dense(module)).norm() / dense(module).norm()
    # Scales and factors are rounded to their 8 or 16 bits; the changes themselves are twice as large or more.
    assert error < 0.01 < (dense(module) - dense(TunableLinear(shape, buffers))).norm() / dense(module).norm()
    if choice.grid in ("int", "uint") and not choice.rank:
        assert torch.equal(packed.get_buffer("codes"), buffers["codes"])


def test_levels_that_change_places_take_their_codes_along() -> None:
    shape, buffers = made(replace(CHOICES[1], bits=2), transposed=False, bias=False)
    module = TunableLinear(shape, buffers)
    with torch.no_grad():
        module.level_change[0] = 0.05 + module.levels[2] - module.levels[0]
    stored = module.packed()
    assert bool((stored["levels"].diff() > 0).all())
    packed = PackedLinear(shape)
    packed.load_state_dict(stored)
    torch.testing.assert_close(packed.dequantized(), dense(module).detach(), rtol=0.02, atol=1e-4)


def test_inputs_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="128"):
        TunableLinear(*made(CHOICES[0], False))(torch.zeros(2, 64))

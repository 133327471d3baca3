"""Where L4Q starts: codes and cells to the bit, losses beside round-to-nearest."""

import itertools

import pytest
import torch
from quant_samples import gaussian, generator

from quant import grid
from quant.exceptions import QuantError, ShapeError
from quant.fakequant import MIN_TRAINED_STEP, L4QLinear
from quant.rounding import feedback
from quant.start import first_codes, into_cells, packed_into_cells

OUT, IN, GROUP = 48, 64, 16
KINDS = pytest.mark.parametrize("half", [False, True])
BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def covariance():
    mixed = gaussian(200, IN, 1) @ gaussian(IN, IN, 2) * torch.linspace(0.2, 3, IN)
    return mixed.T @ mixed / 200


def started(bits, half, method="feedback", weight=None):
    weight = gaussian(OUT, IN) * 0.05 if weight is None else weight
    given = {"importance": covariance().diagonal(), "passing": feedback(covariance(), GROUP)}
    kind = "half" if half else "zero"
    codes, scale, offset = first_codes(weight, bits, GROUP, method=method, offset=kind, **given)
    assert offset is None
    return weight, codes, scale


def rebuilt(codes, scale, half):
    return grid.dequantize(codes, scale, grid.half_step(scale) if half else None)


def loss(weight, codes, scale, half):
    error = (rebuilt(codes, scale, half) - weight).double()
    return (error @ covariance().double() * error).sum().item()


def layer(frozen, bits, half, scale, warm=None, alpha=2.0):
    kind = "half" if half else "zero"
    given = {"bits": bits, "group_size": GROUP, "rank": 3, "alpha": alpha, "generator": generator(3), "offset": kind}
    return L4QLinear(frozen, None, steps=(scale, None), warm_start=warm, **given)


@KINDS
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_than_the_best_nearest_codes(bits, half):
    found = {method: loss(*started(bits, half, method), half) for method in ("feedback", "awmse", "l4q")}
    assert found["feedback"] < 0.8 * min(found["awmse"], found["l4q"])


@KINDS
@pytest.mark.parametrize("bits", [2, 4])
def test_feedback_rounds_as_the_float64_twin(bits, half):
    """Against the twin that solves for every column anew, given the same steps."""
    weight, codes, scale = started(bits, half)
    low, high = grid.bounds(bits)
    order, at = feedback(covariance(), GROUP).order.tolist(), 0.5 if half else 0.0
    damped = covariance().double() + 0.01 * covariance().diagonal().mean().double() * torch.eye(IN).double()
    left, found = weight.double().clone(), torch.empty(OUT, IN).double()
    for done, column in enumerate(order):
        step = scale[:, column // GROUP].double()
        found[:, column] = (left[:, column] / step - at).round().clamp(low, high)
        error = left[:, column] - (found[:, column] + at) * step
        rest = order[done + 1 :]
        if rest:
            block = torch.linalg.inv(damped[order[done:]][:, order[done:]])
            left[:, rest] -= error[:, None] * (block[0, 1:] / block[0, 0])[None]
    assert (found == codes.double()).double().mean() > 0.999


@KINDS
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_moved_into_cells_rounds_to_the_codes(bits, half, dtype):
    weight, codes, scale = started(bits, half)
    inside = into_cells(weight, codes, scale, bits=bits, half=half, dtype=dtype).to(dtype)
    module = layer(inside, bits, half, scale)
    assert torch.equal(module.quantized()[0], codes)
    real = grid.normalise(weight, scale, grid.half_step(scale) if half else None).view_as(weight)
    stays = (real - codes).abs() < (0.49 if dtype == torch.float32 else 0.5 - 2.0 ** (bits - 8) - 0.01)
    assert 0.3 < stays.double().mean() < 1 or bits == 8
    torch.testing.assert_close(
        inside[stays].float(), weight[stays], rtol=2.0**-8 if dtype != torch.float32 else 1e-5, atol=1e-7
    )
    if bits < 8:
        assert (grid.round_codes(real, bits) != codes).double().mean() > 0.05


@KINDS
@pytest.mark.parametrize(("bits", "width"), [(2, 8), (3, 8), (4, 8), (8, 8), (2, 4)])
def test_a_packed_weight_rounds_to_the_codes_and_is_as_near_as_its_places_allow(bits, width, half):
    weight, codes, scale = started(bits, half)
    packed = packed_into_cells(weight, codes, scale, bits=bits, half=half, packed_bits=width)
    module = layer(packed, bits, half, scale)
    assert torch.equal(module.quantized()[0], codes)
    dense = into_cells(weight, codes, scale, bits=bits, half=half, dtype=torch.float32)
    places = 2 ** (width - bits)
    off = (packed.dequantized() - dense).abs() / scale.repeat_interleave(GROUP, dim=1)
    assert off.max() <= (0.499 / (places - 1) if places > 1 else 0.5) * 1.001
    size = sum(buffer.numel() * buffer.element_size() for buffer in packed.buffers())
    assert size == OUT * IN * width // 8 + 4 * OUT * IN // GROUP + 4 * 2**width


@pytest.mark.parametrize("row_chunk", [None, 5])
@KINDS
def test_a_warm_start_is_part_of_the_codes(half, row_chunk):
    weight, warm = gaussian(OUT, IN) * 0.05, (gaussian(3, IN, 5) * 0.1, gaussian(OUT, 3, 6) * 0.1)
    target = torch.addmm(weight, warm[1], warm[0], alpha=2.0)
    _, codes, scale = started(3, half, weight=target)
    inside = into_cells(target, codes, scale, bits=3, half=half, dtype=torch.float32)
    packed = packed_into_cells(target, codes, scale, bits=3, half=half, factors=(warm[1] * -2, warm[0]))
    for frozen in (inside.addmm(warm[1], warm[0], alpha=-2.0), packed):
        module = layer(frozen, 3, half, scale, warm)
        module.row_chunk = row_chunk
        assert torch.equal(module.quantized()[0], codes)
    assert (started(3, half)[1] != codes).double().mean() > 0.1


def test_nearest_codes_come_with_their_grid_and_steps_have_a_floor():
    weight = gaussian(OUT, IN) * 0.05
    weight[:8] *= 1e-6
    for method, kind in itertools.product(("mse", "l4q"), ("zero", "half", "trained")):
        codes, scale, trained = first_codes(weight, 3, GROUP, method=method, offset=kind)
        step, first = grid.init_grid(weight, 3, GROUP, method=method, offset=kind)
        assert torch.equal(scale, step.clamp(min=MIN_TRAINED_STEP))
        assert (trained is None) == (kind != "trained")
        assert trained is None or torch.equal(trained, first)
        offset = grid.half_step(scale) if kind == "half" else trained
        assert torch.equal(codes, grid.quantize(weight, scale, offset, 3)[0])
    _, codes, scale = started(3, half=False, weight=weight)
    assert (scale[:8] == MIN_TRAINED_STEP).all()
    assert (codes[:8] == 0).all()
    assert (codes[8:] != 0).any()


def test_what_does_not_go_together_is_refused():
    weight, codes, scale = started(3, half=False)
    with pytest.raises(QuantError, match="passing"):
        first_codes(weight, 3, GROUP, method="feedback", offset="zero")
    with pytest.raises(QuantError, match="zero or half"):
        first_codes(weight, 3, GROUP, method="feedback", offset="trained", passing=feedback(covariance(), GROUP))
    with pytest.raises(ShapeError, match="blocks of 8"):
        first_codes(weight, 3, GROUP, method="feedback", offset="zero", passing=feedback(covariance(), 8))
    with pytest.raises(QuantError, match="packed in 2"):
        packed_into_cells(weight, codes, scale, bits=3, half=False, packed_bits=2)
    with pytest.raises(ShapeError, match="factors"):
        packed_into_cells(weight, codes, scale, bits=3, half=False, factors=(weight[:, :2], weight[:3]))

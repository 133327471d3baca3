import itertools
import math

import pytest
import torch

from quant import grid
from quant.exceptions import NonFiniteError, QuantError, ShapeError

BITS = (2, 3, 4, 8)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "expected"), [(2, (-2, 1)), (3, (-4, 3)), (4, (-8, 7)), (8, (-128, 127))])
def test_bounds_are_signed_and_asymmetric_by_one(bits, expected):
    assert grid.bounds(bits) == expected


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_bounds_outside_two_to_eight_bits_are_refused(bits):
    with pytest.raises(QuantError, match="2 to 8"):
        grid.bounds(bits)


@pytest.mark.parametrize("bits", BITS)
def test_l4q_and_symmetric_steps_match_a_loop(bits):
    weight = gaussian(3, 24)
    l4q, symmetric = (grid.init_grid(weight, bits, 8, method=m)[0] for m in ("l4q", "symmetric"))
    for row in range(3):
        for group in range(3):
            values = weight[row, 8 * group : 8 * group + 8].tolist()
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            expected = max(abs(min(values) / low), abs(max(values) / high))
            assert math.isclose(l4q[row, group].item(), expected, rel_tol=1e-6)
            assert math.isclose(symmetric[row, group].item(), max(map(abs, values)) / -low, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_l4q_step_clips_nothing_even_where_the_division_rounds_up(bits, dtype):
    weight = gaussian(2048, 64).to(dtype)
    scale = grid.init_grid(weight, bits, 64)[0]
    assert scale.dtype == torch.float32
    _, in_range = grid.quantize(weight.float(), scale, None, bits)
    assert in_range.all()
    if bits == 8:  # the case the tolerance exists for does occur in this sample
        assert (grid.normalise(weight.float(), scale, None) > 127).any()


@pytest.mark.parametrize("bits", BITS)
def test_lsq_plus_and_asymmetric_grids_match_a_loop(bits):
    weight = gaussian(3, 24) + 0.3
    step, offset = grid.init_grid(weight, bits, 8, method="asymmetric", offset="trained")
    lsq, nothing = grid.init_grid(weight, bits, 8, method="lsq+")
    assert nothing is None
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row, group in itertools.product(range(3), range(3)):
        values = weight[row, 8 * group : 8 * group + 8].double()
        mean, deviation = values.mean().item(), values.std(correction=0).item()
        expected = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / -low
        assert lsq[row, group].item() == pytest.approx(expected, rel=1e-5)
        expected = (values.max() - values.min()).item() / (high - low)
        assert step[row, group].item() == pytest.approx(expected, rel=1e-5)
        # The paper gives the offset twice, from either end.
        for end, code in ((values.max(), high), (values.min(), low)):
            assert offset[row, group].item() == pytest.approx(end.item() - expected * code, abs=1e-5)
    assert grid.quantize(weight, step, offset, bits)[1].all()


@pytest.mark.parametrize("bits", BITS)
def test_half_a_step_puts_levels_evenly_around_zero_and_the_range_step_clips_nothing(bits):
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)[None]
    scale = torch.full((1, 1), 0.75)
    levels = grid.dequantize(codes, scale, grid.half_step(scale))
    assert torch.equal(levels, -levels.flip(1))
    if bits == 2:
        assert torch.equal(levels, 0.75 * torch.tensor([[-1.5, -0.5, 0.5, 1.5]]))
    weight = gaussian(512, 64)
    step, offset = grid.init_grid(weight, bits, 64, offset="half")
    assert offset is None
    assert grid.quantize(weight, step, grid.half_step(step), bits)[1].all()
    assert not grid.quantize(weight, 0.99 * step, grid.half_step(0.99 * step), bits)[1].all()


@pytest.mark.parametrize("offset", ["zero", "half", "trained"])
@pytest.mark.parametrize("method", ["mse", "awmse"])
def test_a_searched_step_is_the_best_of_a_loop_over_factors(method, offset):
    weight, bits, size = gaussian(4, 24).double() + 0.2, 3, 8
    importance = torch.rand(24, generator=torch.Generator().manual_seed(5)).double() ** 4 if method == "awmse" else None
    scale, first = grid.init_grid(weight, bits, size, method=method, offset=offset, importance=importance)
    low, high = grid.bounds(bits)
    for row, group in itertools.product(range(4), range(3)):
        columns = slice(size * group, size * group + size)
        values = weight[row, columns]
        cost = torch.ones(size).double() if importance is None else importance[columns]
        middle = (values.max() + values.min()).item() / 2 if offset == "trained" else 0.0
        ranges = {
            "zero": max(values.min().item() / low, values.max().item() / high),
            "half": values.abs().max().item() / (high + 0.5),
            "trained": (values.max() - values.min()).item() / (high - low),
        }
        found = {}
        for factor in range(29):
            step = ranges[offset] * (1 - 0.025 * factor)
            at = 0.0 if offset == "zero" else middle + step / 2
            rounded = ((values - at) / step).clamp(low, high).round() * step + at
            found[step] = ((rounded - values).square() * cost).sum().item()
        assert scale[row, group].item() == pytest.approx(min(found, key=found.__getitem__), rel=1e-9)
        if first is not None:
            assert first[row, group].item() == pytest.approx(middle + scale[row, group].item() / 2, rel=1e-9)


def test_weighted_search_lowers_the_weighted_error_and_half_a_step_suits_two_bits():
    weight, importance = gaussian(64, 128), torch.rand(128, generator=torch.Generator().manual_seed(3)) ** 6
    error, plain = {}, {}
    for method, offset in itertools.product(("mse", "awmse"), ("zero", "half")):
        found = grid.init_grid(weight, 2, 128, method=method, offset=offset, importance=importance)[0]
        at = grid.half_step(found) if offset == "half" else None
        squares = (grid.dequantize(grid.quantize(weight, found, at, 2)[0], found, at) - weight).square()
        error[method, offset], plain[method, offset] = (squares @ importance).sum(), squares.sum()
    for offset in ("zero", "half"):
        assert error["awmse", offset] < 0.98 * error["mse", offset]
    # Relative squared error of Gaussian groups of 128 at 2 bits on evenly spaced levels: about 0.12.
    assert plain["mse", "half"] / weight.square().sum() == pytest.approx(0.12, abs=0.01)
    assert plain["mse", "half"] < 0.85 * plain["mse", "zero"]


def test_grids_that_do_not_go_together_are_refused():
    weight = torch.ones(2, 8)
    with pytest.raises(QuantError, match="offset must be one of"):
        grid.init_grid(weight, 4, 4, offset="third")  # type: ignore[arg-type]
    with pytest.raises(QuantError, match="trained offset"):
        grid.init_grid(weight, 4, 4, method="asymmetric", offset="half")
    with pytest.raises(QuantError, match="importance"):
        grid.init_grid(weight, 4, 4, method="awmse")
    with pytest.raises(ShapeError, match=r"importance must be \[8\]"):
        grid.init_grid(weight, 4, 4, method="awmse", importance=torch.ones(7))


def test_zero_groups_get_a_positive_step():
    weight = torch.zeros(2, 8)
    weight[0, :4] = 1.0
    scale = grid.init_grid(weight, 4, 4)[0]
    assert (scale > 0).all()
    assert scale[1, 0] == pytest.approx(grid.MIN_STEP)
    codes, _ = grid.quantize(weight, scale, None, 4)
    assert (codes[1] == 0).all()


def test_mse_search_never_loses_to_l4q_and_rescues_two_bits():
    weight = gaussian(64, 128)
    error = {}
    for bits in (2, 3, 4):
        for method in ("l4q", "mse"):
            scale = grid.init_grid(weight, bits, 128, method=method)[0]
            rebuilt = grid.dequantize(grid.quantize(weight, scale, None, bits)[0], scale, None)
            error[bits, method] = (rebuilt - weight).square().sum(dim=1)
        assert (error[bits, "mse"] <= error[bits, "l4q"]).all()
    # Relative squared error of Gaussian groups of 128 at 2 bits: about 0.52 for the range step.
    assert error[2, "l4q"].sum() / weight.square().sum() == pytest.approx(0.52, abs=0.03)
    assert error[2, "mse"].sum() < 0.4 * error[2, "l4q"].sum()


def test_step_refuses_ragged_groups_bad_methods_and_non_finite_weights():
    with pytest.raises(ShapeError, match="group_size=5"):
        grid.init_grid(torch.ones(2, 8), 4, 5)[0]
    with pytest.raises(ShapeError, match="group_size=0"):
        grid.init_grid(torch.ones(2, 8), 4, 0)[0]
    with pytest.raises(ShapeError, match="out, in"):
        grid.init_grid(torch.ones(8), 4, 4)[0]
    with pytest.raises(QuantError, match="method"):
        grid.init_grid(torch.ones(2, 8), 4, 4, method="best")[0]  # type: ignore[arg-type]
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(2, 8)
        weight[1, 3] = bad
        with pytest.raises(NonFiniteError):
            grid.init_grid(weight, 4, 4)[0]


def test_rounding_is_half_to_even():
    codes, _ = grid.quantize(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]), torch.ones(1, 1), None, 4)
    assert codes.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_mask_is_taken_on_the_unrounded_code():
    eps = grid.TIE_TOLERANCE
    weight = torch.tensor([[7.0, 7 + eps / 2, 7 + 2 * eps, 7.4, -8.0, -8 - eps / 2, -8.3, 20.0]])
    codes, in_range = grid.quantize(weight, torch.ones(1, 1), None, 4)
    assert codes.tolist() == [[7, 7, 7, 7, -8, -8, -8, 7]]
    assert in_range.tolist() == [[True, True, False, False, True, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_masked_values_are_those_of_the_mask(bits, dtype):
    (low, high), eps = grid.bounds(bits), grid.TIE_TOLERANCE
    edges = [low - 2 * eps, low - eps, low - eps / 2, low, 0.0, high, high + eps / 2, high + eps, high + 2 * eps]
    real = torch.cat([torch.tensor(edges, dtype=dtype), 2 * high * gaussian(1, 4096)[0].to(dtype)])
    values = gaussian(1, len(real), seed=1)[0].to(dtype)
    expected = values * grid.in_range(real, bits)
    assert torch.equal(grid.where_in_range(values, real, bits), expected)
    assert 0 < (expected == 0).sum() < len(real)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("with_offset", [False, True])
def test_in_range_weights_are_within_half_a_step(bits, with_offset):
    weight = gaussian(16, 32).double()
    scale = grid.init_grid(weight, bits, 8)[0] * 0.6
    offset = 0.3 * scale if with_offset else None
    codes, in_range = grid.quantize(weight, scale, offset, bits)
    low, high = grid.bounds(bits)
    assert codes.dtype == torch.int8
    assert codes.min() == low
    assert codes.max() == high
    assert 0.02 < 1 - in_range.double().mean() < 0.6
    distance = (grid.dequantize(codes, scale, offset) - weight).abs()
    half_step = (scale * (0.5 + 1e-9)).repeat_interleave(8, dim=1)
    assert (distance <= half_step)[in_range].all()
    assert (distance > 0).any()
    real = grid.normalise(weight, scale, offset)
    assert torch.equal(real.round().clamp(low, high).view_as(weight), codes.double())


def test_groups_follow_the_input_dimension():
    codes = torch.ones(2, 4, dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    offset = torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    assert grid.dequantize(codes, scale, offset).tolist() == [[1, 1, 2.5, 2.5], [3, 3, 4, 4]]


@pytest.mark.parametrize("bits", BITS)
def test_grid_points_are_fixed_points(bits):
    low, high = grid.bounds(bits)
    codes = torch.arange(low, high + 1, dtype=torch.int8).repeat(3, 4)
    scale = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) + 0.01
    weight = grid.dequantize(codes, scale, None)
    again, in_range = grid.quantize(weight, scale, None, bits)
    assert torch.equal(again, codes)
    assert in_range.all()
    assert torch.equal(grid.dequantize(again, scale, torch.zeros_like(scale)), weight)


def test_rounded_codes_rebuild_the_same_bits_as_integer_codes():
    weight = gaussian(8, 32)
    scale = grid.init_grid(weight, 3, 16)[0]
    as_float = grid.round_codes(grid.normalise(weight, scale, None), 3).view_as(weight)
    as_int, _ = grid.quantize(weight, scale, None, 3)
    bits_of = [grid.dequantize(codes, scale, None).view(torch.int32) for codes in (as_float, as_int)]
    assert torch.equal(*bits_of)


def test_quantize_leaves_its_inputs_alone_and_takes_strided_weights():
    weight = gaussian(16, 8).t()
    scale = grid.init_grid(weight, 4, 4)[0]
    before = weight.clone(), scale.clone()
    codes, _ = grid.quantize(weight, scale, None, 4)
    assert torch.equal(weight, before[0])
    assert torch.equal(scale, before[1])
    assert torch.equal(codes, grid.quantize(weight.contiguous(), scale, None, 4)[0])


def test_misfitting_scale_or_offset_is_refused():
    weight = torch.ones(2, 8)
    for shape in [(3, 2), (2, 3), (2,), (2, 0)]:
        with pytest.raises(ShapeError, match="scale"):
            grid.quantize(weight, torch.ones(shape), None, 4)
    with pytest.raises(ShapeError, match="offset"):
        grid.dequantize(weight.to(torch.int8), torch.ones(2, 2), torch.ones(2, 4))

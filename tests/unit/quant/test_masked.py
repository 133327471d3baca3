"""Zeros among the codes of a packed map: against a float64 twin that solves for every column, on every grid."""

import itertools

import pytest
import torch

from quant import reference
from quant.blockwise import quantize, zero_codes
from quant.buffers import first_level_scales, packed_buffers, zero_points
from quant.codebook import levels_of
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.linear import dense_weight
from quant.lowrank import store_factors
from quant.masked import masked_buffers, residual, zero_entries
from quant.pack import pack, unpack
from quant.rounding import feedback, quantize_compensated, round_masked
from quant.storage import SEARCHED, UNSEARCHED, Choice, PackedShape

OUT, IN, BLOCK, RANK = 24, 32, 8, 3
GRIDS = ("nf", "lloyd", "int", "uint")
BOTH = pytest.mark.parametrize("transposed", [False, True])
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS)


def _random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _covariance(size=IN, tokens=100):
    mixed = _random(tokens, size, seed=1) @ _random(size, size, seed=9)
    mixed *= torch.linspace(0.2, 3, size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))]
    return mixed.T @ mixed / tokens


def _shape(grid, bits, transposed, size=(OUT, IN), **stored):
    stored = {"scale_bits": 16, "scale_dtype": "float16"} if grid in ("int", "uint") else stored
    return PackedShape(size[1], size[0], Choice(grid, bits, BLOCK, RANK, factor_dtype="int8", **stored), transposed)


def _packed(shape, weight, multiples=SEARCHED):
    """A map as decompose leaves it: Q of the weight less a low-rank part."""
    out, inputs = weight.shape
    factors = store_factors(_random(out, RANK, seed=4) / 3, _random(RANK, inputs, seed=5) / 3, "int8")
    left, right, scale = factors
    rest = weight - left.float() * scale @ right.float()
    passing = feedback(_covariance(inputs), None if shape.transposed else BLOCK)
    found = quantize_compensated(rest, shape.choice, passing, transposed=shape.transposed, multiples=multiples)
    return packed_buffers(found, factors, shape), passing


def _spread(values, shape):
    """Of blocks to entries [out, in]."""
    wide = values.repeat_interleave(BLOCK, dim=1)
    return wide.T if shape.transposed else wide


def _mask(out=OUT, inputs=IN, ratio=0.5):
    return torch.rand(out, inputs, generator=torch.Generator().manual_seed(7)) < ratio


@EVERY_GRID
@pytest.mark.parametrize(("bits", "multiples"), [*itertools.product((2, 3, 4, 8), (UNSEARCHED, SEARCHED))])
def test_every_grid_has_a_code_for_exactly_zero(grid, bits, multiples):
    choice = _shape(grid, bits, False).choice
    levels = levels_of(choice, multiples)
    zero = quantize(_random(4, IN) + 0.3, choice, multiples=multiples).zero
    codes = zero_codes(levels, zero)
    assert codes.dtype == torch.uint8
    assert not (levels[codes.int()] - (0 if zero is None else zero.float())).any()
    assert (zero is None) == (codes.numel() == 1)


def test_tuned_levels_have_none():
    with pytest.raises(QuantError, match="no level stands for an exact zero"):
        zero_codes(torch.tensor([-1.0, -0.1, 0.2, 1.0]), None)


@BOTH
@pytest.mark.parametrize(
    "stored", [{}, {"scale_bits": 4, "superblock": 6}, {"scale_bits": 32, "scale_dtype": "float32"}]
)
@pytest.mark.parametrize(("grid", "bits"), [*itertools.product(GRIDS, (3,)), ("lloyd", 2), ("nf", 4)])
def test_equals_the_column_by_column_solution(grid, bits, stored, transposed):
    """1e-4: fp32 against float64."""
    shape, weight, mask = _shape(grid, bits, transposed, **stored), _random(OUT, IN), _mask()
    buffers, passing = _packed(shape, weight)
    found = masked_buffers(weight, mask, buffers, shape, passing)
    zero = zero_points(buffers, shape)
    expected = reference.round_masked(
        residual(weight, buffers),
        _covariance(),
        mask,
        _spread(first_level_scales(buffers, shape), shape),
        buffers["levels"],
        None if zero is None else _spread(zero, shape),
        order=passing.order.tolist(),
        damping=0.01,
    )
    quantised = dense_weight(found, shape, include_lowrank=False)
    torch.testing.assert_close(quantised.double(), expected, rtol=1e-4, atol=1e-6)
    assert not quantised[mask].any()
    assert bool(zero_entries(found, shape)[mask].all())
    assert torch.equal(zero_entries(found, shape), quantised == 0)
    same = found.keys() - {"codes"}
    assert found.keys() == buffers.keys()
    assert all(torch.equal(found[name], buffers[name]) for name in same)


@BOTH
def test_more_columns_than_are_corrected_one_by_one(transposed):
    shape, weight, mask = _shape("lloyd", 3, transposed, (16, 272)), _random(16, 272), _mask(16, 272)
    buffers, passing = _packed(shape, weight)
    found = dense_weight(masked_buffers(weight, mask, buffers, shape, passing), shape, include_lowrank=False)
    scale = _spread(first_level_scales(buffers, shape), shape)
    expected = reference.round_masked(
        residual(weight, buffers),
        _covariance(272),
        mask,
        scale,
        buffers["levels"],
        None,
        order=passing.order.tolist(),
        damping=0.01,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


@BOTH
@EVERY_GRID
def test_later_columns_make_up_for_zeros(grid, transposed):
    """Less is lost than by codes set to zero where they stand, under the covariance of the inputs and within scales
    that were not made for corrections."""
    shape, weight, mask = _shape(grid, 4, transposed), _random(OUT, IN), _mask()
    buffers, passing = _packed(shape, weight)

    def loss(found):
        error = (weight - dense_weight(found, shape)).double()
        return float((error @ _covariance().double() * error).sum())

    codes = unpack(buffers["codes"], 4, shape.columns)
    stored_mask = mask.T if transposed else mask
    zeros = zero_codes(buffers["levels"], zero_points(buffers, shape)).repeat_interleave(BLOCK, dim=1)
    zeros = zeros.expand_as(codes) if zeros.shape == codes.shape else zeros[:, :1].expand_as(codes)
    dropped = buffers | {"codes": pack(torch.where(stored_mask, zeros, codes), 4)}
    assert torch.equal(zero_entries(dropped, shape) | ~mask, torch.ones_like(mask))
    assert loss(masked_buffers(weight, mask, buffers, shape, passing)) < 0.9 * loss(dropped)


@BOTH
@EVERY_GRID
def test_no_mask_and_weights_it_can_represent_give_the_same_codes(grid, transposed):
    shape = _shape(grid, 3, transposed, scale_bits=32, scale_dtype="float32")
    buffers, passing = _packed(shape, _random(OUT, IN))
    whole = dense_weight(buffers, shape)
    none = torch.zeros(OUT, IN, dtype=torch.bool)
    found = masked_buffers(whole, none, buffers, shape, passing)
    torch.testing.assert_close(dense_weight(found, shape), whole, rtol=1e-5, atol=1e-6)
    # What is representable with zeros is found with zeros.
    sparse = masked_buffers(_random(OUT, IN), _mask(), buffers, shape, passing)
    again = masked_buffers(dense_weight(sparse, shape), _mask(), buffers, shape, passing)
    torch.testing.assert_close(dense_weight(again, shape), dense_weight(sparse, shape), rtol=1e-5, atol=1e-6)


@BOTH
def test_a_whole_row_or_everything_may_go(transposed):
    shape, weight = _shape("uint", 3, transposed), _random(OUT, IN)
    buffers, passing = _packed(shape, weight)
    mask = _mask()
    mask[4], mask[:, 6] = True, True
    assert not dense_weight(masked_buffers(weight, mask, buffers, shape, passing), shape, False)[mask].any()
    everything = torch.ones_like(mask)
    assert not dense_weight(masked_buffers(weight, everything, buffers, shape, passing), shape, False).any()


def test_blocks_without_a_scale_stay_zero():
    shape, weight = _shape("int", 3, False), _random(OUT, IN)
    weight[:, :BLOCK] = 0
    codes = quantize(weight, shape.choice)
    passing = feedback(_covariance(), BLOCK)
    found = round_masked(weight, passing, _mask(), codes.scales.values.float(), codes.levels)
    assert bool((found[:, :BLOCK] == 4).all())


def test_bad_requests_are_refused():
    shape, weight, mask = _shape("uint", 3, False), _random(OUT, IN), _mask()
    buffers, passing = _packed(shape, weight)
    scale, zero = first_level_scales(buffers, shape), zero_points(buffers, shape)
    levels = buffers["levels"]
    before = weight.clone(), mask.clone(), buffers["codes"].clone()
    round_masked(weight, passing, mask, scale, levels, zero)
    masked_buffers(weight, mask, buffers, shape, passing)
    assert all(map(torch.equal, before, (weight, mask, buffers["codes"])))
    for bad in (mask[:5], mask.int()):
        with pytest.raises(ShapeError, match=r"expected a mask bool \[24, 32\]"):
            round_masked(weight, passing, bad, scale, levels, zero)
    with pytest.raises(ShapeError, match="zero"):
        round_masked(weight, passing, mask, scale, levels, zero[:, :2])
    for bad in (scale[:5], scale[:, :3]):
        with pytest.raises(ShapeError, match=r"scale .* does not fit"):
            round_masked(weight, passing, mask, bad, levels, None)
    with pytest.raises(ShapeError, match="blocks of 8 together, expected None"):
        round_masked(weight.T.contiguous(), passing, mask.T, scale, levels, zero, transposed=True)
    with pytest.raises(QuantError, match="no level stands"):
        round_masked(weight, passing, mask, scale, levels + 0.5)
    with pytest.raises(QuantError, match="float32"):
        round_masked(weight.double(), passing, mask, scale, levels, zero)
    weight[3, 4] = float("nan")
    with pytest.raises(NonFiniteError, match="weight"):
        round_masked(weight, passing, mask, scale, levels, zero)

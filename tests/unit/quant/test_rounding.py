"""Against a float64 twin that solves for every column; values agree to 1e-4 relative, costs to 1e-5."""

import itertools

import pytest
import torch

from quant import reference
from quant.blockwise import encode_block, quantize, rebuild
from quant.codebook import levels_of
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.rounding import feedback, quantize_compensated
from quant.scales import scales
from quant.storage import SEARCHED, UNSEARCHED, Choice

OUT, IN, BLOCK = 24, 32, 8
GRIDS = ("nf", "lloyd", "int", "uint")
SCALES = (
    {"scale_dtype": "float32"},
    {"scale_bits": 4, "superblock": 6},
    {"scale_bits": 32, "scale_dtype": "float32"},
)
BOTH = pytest.mark.parametrize("transposed", [False, True])


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _weight(out=OUT, inputs=IN, seed=0):
    return torch.randn(out, inputs, generator=_generator(seed))


def _covariance(size=IN, tokens=100, seed=1):
    """Correlated inputs of unequal size."""
    mixed = torch.randn(tokens, size, generator=_generator(seed)) @ torch.randn(size, size, generator=_generator(9))
    mixed *= torch.linspace(0.2, 3, size)[torch.randperm(size, generator=_generator(seed))]
    return mixed.T @ mixed / tokens


def _passing(covariance, transposed, damping=0.01, block=BLOCK):
    return feedback(covariance, None if transposed else block, damping)


def _rebuilt(quantized, choice, transposed):
    dense = rebuild(quantized, choice)
    return dense.T if transposed else dense


def _nearest(weight, choice, transposed):
    return _rebuilt(quantize(weight.T.contiguous() if transposed else weight, choice), choice, transposed)


def _loss(error, covariance):
    return (error.double() @ covariance.double() * error).sum().item()


def _damped(covariance, damping=0.01):
    return covariance.double() + damping * covariance.diagonal().mean().double() * torch.eye(len(covariance))


@BOTH
@pytest.mark.parametrize("multiples", [UNSEARCHED, SEARCHED])
@pytest.mark.parametrize("stored", SCALES)
@pytest.mark.parametrize(("grid", "bits"), [*itertools.product(GRIDS, [3]), ("lloyd", 2), ("nf", 4)])
def test_equals_the_column_by_column_solution(grid, bits, stored, multiples, transposed):
    choice, weight, covariance = Choice(grid, bits, BLOCK, 0, **stored), _weight(), _covariance()
    passing = _passing(covariance, transposed)
    found = quantize_compensated(weight, choice, passing, transposed=transposed, multiples=multiples)
    levels = levels_of(choice, multiples)
    expected, errors, left = reference.compensated(
        weight, choice, covariance, transposed=transposed, levels=levels, damping=0.01, multiples=multiples
    )
    torch.testing.assert_close(_rebuilt(found, choice, transposed).double(), expected, rtol=1e-4, atol=1e-6)
    assert int(found.codes.max()) < 2**bits
    torch.testing.assert_close(weight - expected, errors @ left)


@BOTH
@pytest.mark.parametrize("damping", [0.0, 0.03, 1.0])
def test_a_column_costs_what_its_error_leaves_behind(damping, transposed):
    """Under the covariance that losses are measured with, not the damped one that errors are passed on with; with
    nothing damped the costs of all columns add up to the loss."""
    choice, weight, covariance = Choice("lloyd", 3, BLOCK, 0), _weight(), _covariance()
    passing = _passing(covariance, transposed, damping)
    _, errors, left = reference.compensated(
        weight, choice, covariance, transposed=transposed, levels=levels_of(choice), damping=damping
    )
    cost = (left @ covariance.double() * left).sum(dim=1)
    torch.testing.assert_close(passing.column_cost().double(), cost, rtol=1e-4, atol=0)
    total = (passing.column_cost().double() * errors.square().sum(dim=0)).sum().item()
    loss = _loss(
        weight - _rebuilt(quantize_compensated(weight, choice, passing, transposed=transposed), choice, transposed),
        covariance,
    )
    assert (loss == pytest.approx(total, rel=1e-3)) == (damping == 0)
    assert loss == pytest.approx(total, rel=0.25)


@BOTH
def test_errors_grow_by_what_earlier_ones_pass_on(transposed):
    """One column after another, in float64; a column that is represented exactly, or has no weights, has no errors."""
    choice, weight, covariance = Choice("lloyd", 2, BLOCK, 0), _weight(), _covariance()
    _, _, left = reference.compensated(
        weight, choice, covariance, transposed=transposed, levels=levels_of(choice), damping=0.01
    )
    passing = _passing(covariance, transposed)
    energy = weight.square().sum(dim=0)
    nearest = 0.3 * energy * torch.rand(IN, generator=_generator(5))
    energy[3], nearest[3], nearest[7] = 0, 0, 0
    expected = torch.zeros(IN, dtype=torch.float64)
    for column in passing.order.tolist():
        if nearest[column]:
            carried = energy[column] + sum(expected[i] * left[i, column] ** 2 for i in range(IN))
            expected[column] = nearest[column] / energy[column] * carried
    growth = passing.chain().growth(energy, nearest)
    torch.testing.assert_close((growth * nearest).double(), expected, rtol=1e-4, atol=0)
    assert growth[[3, 7]].tolist() == [1, 1]
    assert growth.max() > 1.5


@BOTH
def test_many_columns_equal_the_column_by_column_solution(transposed):
    """More columns than are corrected one by one."""
    choice, weight, covariance = Choice("lloyd", 3, 16, 0), _weight(16, 272), _covariance(272, 400)
    passing = _passing(covariance, transposed, block=16)
    found = quantize_compensated(weight, choice, passing, transposed=transposed)
    expected, *_ = reference.compensated(
        weight, choice, covariance, transposed=transposed, levels=levels_of(choice), damping=0.01
    )
    torch.testing.assert_close(_rebuilt(found, choice, transposed).double(), expected, rtol=1e-3, atol=1e-5)


@BOTH
@pytest.mark.parametrize("grid", GRIDS)
def test_uncorrelated_inputs_make_it_the_nearest_rounding(grid, transposed):
    """Direct scales: code for code. Double-quantised: within a second level with a quarter more room, whose steps are
    so much wider; codes are the nearest against those scales."""
    weight, passing = _weight(), _passing(torch.eye(IN), transposed)
    stored_weight = weight.T.contiguous() if transposed else weight
    direct = Choice(grid, 3, BLOCK, 0, 32, "float32")
    plain, found = quantize(stored_weight, direct), quantize_compensated(weight, direct, passing, transposed=transposed)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales.values, plain.scales.values)
    assert (found.zero is None) == (grid != "uint")
    assert found.zero is None or torch.equal(found.zero, plain.zero)

    coded = Choice(grid, 3, BLOCK, 0, scale_dtype="float32")
    found = quantize_compensated(weight, coded, passing, transposed=transposed)
    narrow = quantize(stored_weight, coded).scales
    assert found.scales.offset.item() == pytest.approx(narrow.offset.item(), rel=1e-6)
    wide = 1.25 * (narrow.maximum + narrow.offset) - narrow.offset
    torch.testing.assert_close(found.scales.maximum, wide, rtol=1e-5, atol=0)
    scale, wanted = scales(found.scales, coded), plain.scales.values
    half_step = found.scales.maximum[:, None] / (127 if grid == "lloyd" else 255) / 2
    assert bool(((scale - wanted).abs() <= half_step * (1 + 1e-4)).all())
    assert torch.equal(found.codes, encode_block(stored_weight, scale, found.levels, found.zero))


@BOTH
@pytest.mark.parametrize("grid", GRIDS)
def test_representable_weights_lose_nothing(grid, transposed):
    choice = Choice(grid, 3, BLOCK, 0, 32, "float32")
    weight = _nearest(_weight(), choice, transposed).contiguous()
    found = quantize_compensated(weight, choice, _passing(_covariance(), transposed), transposed=transposed)
    torch.testing.assert_close(_rebuilt(found, choice, transposed), weight, rtol=1e-6, atol=1e-6)


@BOTH
def test_zero_stays_zero(transposed):
    weight = _weight()
    weight[:, :BLOCK] = 0
    for grid, stored in itertools.product(GRIDS, SCALES):
        choice = Choice(grid, 3, BLOCK, 0, **stored)
        zero = torch.zeros_like(weight)
        found = quantize_compensated(zero, choice, _passing(_covariance(), transposed), transposed=transposed)
        assert not rebuild(found, choice).any()
        found = quantize_compensated(weight, choice, _passing(_covariance(), transposed), transposed=transposed)
        assert bool(torch.isfinite(rebuild(found, choice)).all())


def test_dead_inputs_pass_nothing_on():
    """Live inputs are rounded as if the others were not there; dead ones to the nearest codes."""
    live = torch.arange(IN) % 4 > 0
    covariance = _covariance() * live * live[:, None]
    choice, weight = Choice("nf", 3, BLOCK, 0, 32, "float32"), _weight()
    order = feedback(covariance, None).order
    assert set(order[int(live.sum()) :].tolist()) == set((~live).nonzero().flatten().tolist())
    found = rebuild(quantize_compensated(weight, choice, feedback(covariance, None), transposed=True), choice).T
    assert torch.equal(found[:, ~live], _nearest(weight, choice, True)[:, ~live])
    # The damping is a share of the mean over all inputs.
    alone = feedback(covariance[live][:, live], None, 0.01 * live.float().mean().item())
    only = rebuild(quantize_compensated(weight[:, live].contiguous(), choice, alone, transposed=True), choice).T
    torch.testing.assert_close(found[:, live], only, rtol=1e-5, atol=1e-6)


@BOTH
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_few_tokens_are_enough(tokens, transposed):
    """No, one (a covariance of rank one) or three tokens: finite, and what these tokens see improves."""
    x = torch.randn(tokens, IN, generator=_generator(4))
    covariance = x.T @ x / max(1, tokens)
    choice, weight = Choice("lloyd", 3, BLOCK, 0), _weight()
    found = quantize_compensated(weight, choice, _passing(covariance, transposed), transposed=transposed)
    error = weight - _rebuilt(found, choice, transposed)
    assert bool(torch.isfinite(error).all())
    if tokens:
        assert _loss(error, covariance) < 0.5 * _loss(weight - _nearest(weight, choice, transposed), covariance)


@BOTH
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
def test_beats_nearest_rounding_on_correlated_inputs(grid, bits, transposed):
    choice, weight, covariance = Choice(grid, bits, 16, 0), _weight(64, 96), _covariance(96, 300)
    found = quantize_compensated(weight, choice, _passing(covariance, transposed, block=16), transposed=transposed)
    compensated = _loss(weight - _rebuilt(found, choice, transposed), covariance)
    assert compensated < 0.9 * _loss(weight - _nearest(weight, choice, transposed), covariance)


def test_order_keeps_blocks_together_and_starts_with_the_largest():
    covariance = torch.diag(torch.tensor([1.0, 2.0, 9.0, 0.5, 3.0, 3.0]))
    assert feedback(covariance, None).order.tolist() == [2, 4, 5, 1, 0, 3]
    assert feedback(covariance, 2).order.tolist() == [2, 3, 4, 5, 1, 0]
    assert feedback(covariance, 3).order.tolist() == [2, 1, 0, 4, 5, 3]
    # By mean, not by the largest.
    assert feedback(torch.diag(torch.tensor([5.0, 0.0, 3.0, 3.0])), 2).order.tolist() == [2, 3, 0, 1]


def test_root_factors_the_damped_inverse():
    """1e-5: rounding to fp32 of a factor made in float64."""
    covariance = _covariance()
    for block in (None, BLOCK):
        passing = feedback(covariance, block, 0.05)
        root = passing.root.double()
        assert torch.equal(passing.root, passing.root.triu())
        assert bool((root.diagonal() > 0).all())
        inverse = torch.linalg.inv(_damped(covariance, 0.05))[passing.order][:, passing.order]
        torch.testing.assert_close(root.T @ root, inverse, rtol=1e-5, atol=1e-5 * inverse.abs().max().item())


def test_an_ill_conditioned_covariance_is_factored_in_float64():
    """A massive input beside almost dead ones, hardly damped: in fp32 the costs of the small ones would be noise."""
    covariance = _covariance() * 1e-4
    covariance[5] *= 1e4
    covariance[:, 5] *= 1e4
    damping = 1e-9
    passing = feedback(covariance, None, damping)
    ordered = covariance.double()[passing.order][:, passing.order]
    hessian = _damped(covariance, damping)[passing.order][:, passing.order]
    for step in range(0, IN, 5):
        inverse = torch.linalg.inv(hessian[step:, step:])
        left = inverse[0] / inverse[0, 0]
        exact = (left @ ordered[step:, step:] @ left).item()
        assert passing.column_cost()[passing.order[step]].item() == pytest.approx(exact, rel=1e-4)


@BOTH
def test_levels_of_the_callers_own(transposed):
    levels, choice = torch.tensor([-0.9, -0.1, 0.2, 1.0]), Choice("lloyd", 2, BLOCK, 0)
    passing = _passing(_covariance(), transposed)
    found = quantize_compensated(_weight(), choice, passing, transposed=transposed, levels=levels)
    assert torch.equal(found.levels, levels)
    expected, _, _ = reference.compensated(
        _weight(), choice, _covariance(), transposed=transposed, levels=levels, damping=0.01
    )
    torch.testing.assert_close(_rebuilt(found, choice, transposed).double(), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(QuantError, match="increasing"):
        quantize_compensated(_weight(), choice, passing, transposed=transposed, levels=levels.flip(0))


def test_input_is_left_alone():
    weight, covariance = _weight(), _covariance()
    kept = weight.clone(), covariance.clone()
    for transposed in (False, True):
        passing = _passing(covariance, transposed)
        quantize_compensated(weight, Choice("nf", 3, BLOCK, 0), passing, transposed=transposed)
    assert torch.equal(weight, kept[0])
    assert torch.equal(covariance, kept[1])


def test_bad_requests_are_refused():
    covariance, weight, choice = _covariance(), _weight(), Choice("nf", 3, BLOCK, 0)
    for bad in (covariance[:5], covariance[:30, :30]):
        with pytest.raises(ShapeError, match="multiple of 8"):
            feedback(bad, BLOCK)
    with pytest.raises(NonFiniteError, match="covariance"):
        feedback(covariance / 0, None)
    with pytest.raises(QuantError, match="raise the damping"):
        feedback(-covariance, None)
    with pytest.raises(ShapeError, match="blocks of 8 together, expected None"):
        quantize_compensated(weight, choice, feedback(covariance, BLOCK), transposed=True)
    with pytest.raises(ShapeError, match="blocks of None together, expected 8"):
        quantize_compensated(weight, choice, feedback(covariance, None))
    with pytest.raises(ShapeError, match="covariance of 32 inputs"):
        quantize_compensated(weight[:, :24].contiguous(), choice, feedback(covariance, BLOCK))
    with pytest.raises(QuantError, match="float32"):
        quantize_compensated(weight.double(), choice, feedback(covariance, BLOCK))
    with pytest.raises(ShapeError, match="superblocks of 7"):
        quantize_compensated(weight, Choice("nf", 3, BLOCK, 0, superblock=7), feedback(covariance, BLOCK))
    weight[3, 4] = float("inf")
    with pytest.raises(NonFiniteError, match="weight"):
        quantize_compensated(weight, choice, feedback(covariance, BLOCK))

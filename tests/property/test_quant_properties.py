"""Laws of block quantisation over random shapes, widths and values."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import reference
from quant.blockwise import dequantize, encode_block, quantize, rebuild
from quant.buffers import first_level_scales, packed_buffers, slice_rows, zero_points
from quant.codebook import encode, lloyd_fit, normal_float
from quant.decompose import decompose
from quant.linear import PackedLinear
from quant.lowrank import dequantize_factors, store_factors
from quant.moments import DiagonalMoments
from quant.pack import pack, unpack
from quant.scales import scales
from quant.storage import FACTOR_DTYPES, GRIDS, Choice, PackedShape, packed_columns

BITS = st.sampled_from([2, 3, 4, 8])
SEEDS = st.integers(0, 2**31 - 1)
SCALE_DTYPES = st.sampled_from(["bfloat16", "float16", "float32"])

settings.register_profile("quant", deadline=None, derandomize=True, max_examples=60)
QUANT = settings.get_profile("quant")


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def _problems(draw, grids=GRIDS, direct=True):
    """A choice and a matrix it fits: sizes, spread of magnitudes and zeroed blocks all vary."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16, 32]))
    blocks, rows = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    superblock = draw(st.sampled_from([None, 1, blocks * rows]))
    stored = draw(st.sampled_from([None, (16, "bfloat16"), (32, "float32")] if direct else [None]))
    stored = (*stored, None) if stored else (draw(BITS), draw(SCALE_DTYPES), superblock)
    choice = Choice(draw(st.sampled_from(grids)), draw(BITS), block_size, 0, *stored)
    generator = _generator(draw(SEEDS))
    weight = torch.randn(rows, blocks, block_size, generator=generator)
    weight *= 10 ** (draw(st.integers(0, 4)) * (torch.rand(rows, blocks, 1, generator=generator) - 1))
    weight *= torch.rand(rows, blocks, 1, generator=generator) > draw(st.sampled_from([0.0, 0.3, 1.0]))
    return choice, weight.view(rows, -1)


@QUANT
@given(rows=st.integers(0, 5), columns=st.integers(1, 130), bits=BITS, seed=SEEDS)
def test_pack_round_trip_and_row_slicing(rows, columns, bits, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=_generator(seed))
    words = pack(codes, bits)
    assert words.shape == (rows, packed_columns(columns, bits))
    assert words.shape[1] * 32 >= columns * bits
    assert torch.equal(unpack(words, bits, columns), codes)
    kept = torch.randperm(rows, generator=_generator(seed))[: rows // 2]
    assert torch.equal(pack(codes[kept], bits), words[kept])


@QUANT
@given(rows=st.integers(1, 2), columns=st.integers(1, 70), bits=BITS, seed=SEEDS)
def test_pack_equals_the_bit_by_bit_reference(rows, columns, bits, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=_generator(seed))
    assert torch.equal(pack(codes, bits), reference.pack(codes, bits))


@QUANT
@given(values=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=50), bits=BITS)
def test_encode_picks_a_nearest_level(values, bits):
    # fp32 midpoints may misjudge a distance by an ulp of 2, hence 2.4e-7.
    x, codebook = torch.tensor(values), normal_float(bits).double()
    chosen = (x.double() - codebook[encode(x, normal_float(bits)).long()]).abs()
    assert bool((chosen <= (x.double()[:, None] - codebook).abs().amin(dim=1) + 2.4e-7).all())


@QUANT
@given(bits=BITS, seed=SEEDS)
def test_encode_never_decreases_and_levels_are_fixed_points(bits, seed):
    codebook = normal_float(bits)
    x = (torch.rand(9000, generator=_generator(seed)) * 2.4 - 1.2).sort().values
    assert bool((encode(x, codebook).int().diff() >= 0).all())
    assert torch.equal(encode(codebook, codebook), torch.arange(2**bits).to(torch.uint8))


@QUANT
@given(levels=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20, unique=True), seed=SEEDS)
def test_encode_agrees_with_bisection_on_any_codebook(levels, seed):
    codebook = torch.tensor(sorted(levels))
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    x = torch.cat([torch.rand(9000, generator=_generator(seed)) * 2.4 - 1.2, midpoints, codebook])
    assert torch.equal(encode(x, codebook), torch.bucketize(x, midpoints).to(torch.uint8))


@QUANT
@given(problem=_problems())
def test_quantising_is_finite_bounded_and_stays_in_range(problem):
    choice, weight = problem
    quantized = quantize(weight, choice)
    assert int(quantized.codes.max()) < 2**choice.bits
    assert choice.direct or int(quantized.scales.values.max()) < 2**choice.scale_bits
    rebuilt = rebuild(quantized, choice)
    assert bool(torch.isfinite(rebuilt).all())
    scale, levels = scales(quantized.scales, choice), quantized.levels
    zero = torch.zeros_like(scale) if quantized.zero is None else quantized.zero.float()
    blocks = weight.view(len(weight), -1, choice.block_size)
    low, high = blocks.amin(dim=-1), blocks.amax(dim=-1)
    ends = scale * (levels[0] - zero), scale * (levels[-1] - zero)
    clipped = torch.maximum(torch.minimum(*ends) - low, high - torch.maximum(*ends)).clamp(min=0)
    # fp32 rounding of value / scale * scale: a few ulps of the block's largest value.
    bound = levels.diff().max() / 2 * scale.abs() + clipped + 1e-6 * torch.maximum(high.abs(), low.abs())
    assert bool(((weight - rebuilt).abs() <= bound.repeat_interleave(choice.block_size, 1)).all())
    assert not rebuilt[(scale == 0).repeat_interleave(choice.block_size, 1)].any()


@QUANT
@given(problem=_problems(), seed=SEEDS)
def test_representable_values_lose_nothing(problem, seed):
    """Against the scales they were made with, on every grid: codes come back, and so do the values."""
    choice, weight = problem
    quantized = quantize(weight, choice)
    scale, zero = scales(quantized.scales, choice), quantized.zero
    codes = torch.randint(0, 2**choice.bits, weight.shape, dtype=torch.uint8, generator=_generator(seed))
    values = dequantize(codes, scale, quantized.levels, zero)
    again = encode_block(values, scale, quantized.levels, zero)
    assert torch.equal(dequantize(again, scale, quantized.levels, zero), values)
    alive = (scale != 0).repeat_interleave(choice.block_size, 1)
    assert torch.equal(again[alive], codes[alive])


@QUANT
@given(
    problem=_problems(),
    factor_dtype=st.sampled_from(FACTOR_DTYPES),
    rank=st.integers(0, 3),
    transposed=st.booleans(),
    seed=SEEDS,
)
def test_what_is_stored_is_what_was_quantised_whole_and_sliced(problem, factor_dtype, rank, transposed, seed):
    choice, weight = problem
    choice = replace(choice, rank=rank, factor_dtype=factor_dtype)
    rows, columns = weight.shape
    generator = _generator(seed)
    quantized = quantize(weight, choice)
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    left, right = torch.randn(outputs, rank, generator=generator), torch.randn(rank, inputs, generator=generator)
    shape = PackedShape(inputs, outputs, choice, transposed)
    buffers = packed_buffers(quantized, store_factors(left, right, factor_dtype), shape)
    spec = {name: (getattr(torch, dtype), size) for name, (dtype, size) in shape.buffers().items()}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in buffers.items()} == spec
    assert torch.equal(unpack(buffers["codes"], choice.bits, columns), quantized.codes)
    assert torch.equal(first_level_scales(buffers, shape), scales(quantized.scales, choice))
    zero = zero_points(buffers, shape)
    assert zero is quantized.zero or torch.equal(zero, quantized.zero)
    module = PackedLinear(shape)
    module.load_state_dict(buffers)
    bare = module.dequantized(include_lowrank=False)
    assert torch.equal(bare.T if transposed else bare, rebuild(quantized, choice))

    kept = torch.randperm(rows, generator=generator)[: max(1, rows // 2)]
    fewer = (len(kept), columns) if transposed else (columns, len(kept))
    small = PackedLinear(PackedShape(*fewer, choice.sliced(), transposed))
    small.load_state_dict(slice_rows(buffers, shape, kept))
    whole = module.dequantized()
    assert torch.equal(small.dequantized(), whole[:, kept] if transposed else whole[kept])


@QUANT
@given(problem=_problems(direct=False), exponent=st.integers(-3, 3))
def test_powers_of_two_pass_through(problem, exponent):
    choice, weight = problem
    choice = replace(choice, scale_dtype="float32")
    factor = 2.0**exponent
    one, two = quantize(weight, choice), quantize(factor * weight, choice)
    # Only the absolute threshold under which a spread of scales counts as none can tell the two apart.
    if bool(((one.scales.maximum == 0) | (one.scales.maximum > 1e-6)).all()):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scales.values, two.scales.values)
        assert torch.equal(factor * one.scales.maximum, two.scales.maximum)


@QUANT
@given(seed=SEEDS, count=st.integers(2, 16), size=st.integers(1, 300), coarse=st.booleans())
def test_fitted_levels_increase_and_never_cost_more(seed, count, size, coarse):
    generator = _generator(seed)
    values, weights = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    if coarse:  # many equal values, and cells without any
        values = (values * 2).round() / 2
    init = torch.linspace(-1.5, 1.0, count)
    found = lloyd_fit(values, weights, init)
    assert bool((found.diff() > 0).all())

    def cost(levels):
        return (weights.double() * (values.double() - levels.double()[encode(values, levels).long()]).square()).sum()

    assert cost(found) <= cost(init) * (1 + 1e-6) + 1e-12


@settings(QUANT, max_examples=20)
@given(
    seed=SEEDS,
    bits=BITS,
    rank=st.integers(0, 12),
    patience=st.integers(1, 3),
    grid=st.sampled_from(GRIDS),
    factor_dtype=st.sampled_from(FACTOR_DTYPES),
)
def test_decomposition_keeps_its_best_iterate(seed, bits, rank, patience, grid, factor_dtype):
    weight = torch.randn(24, 32, generator=_generator(seed))
    choice = Choice(grid, bits, 16, rank, factor_dtype=factor_dtype)
    result = decompose(weight, choice, generator=_generator(seed), max_iterations=6, patience=patience)
    left, right = dequantize_factors(result.left, result.right, result.factor_scale)
    rebuilt = rebuild(result.quantized, choice) + left @ right
    assert result.loss == min(result.losses)
    torch.testing.assert_close(torch.tensor(result.loss), (weight - rebuilt).square().sum(), rtol=1e-4, atol=1e-9)


@QUANT
@given(seed=SEEDS, cut=st.integers(1, 39), order=st.booleans())
def test_moments_do_not_depend_on_how_tokens_are_split(seed, cut, order):
    tokens = torch.randn(40, 5, generator=_generator(seed))
    whole, one, two = (DiagonalMoments(5, 5) for _ in range(3))
    whole.update_input(tokens)
    one.update_input(tokens[:cut])
    two.update_input(tokens[cut:])
    first, second = (one, two) if order else (two, one)
    first.merge(second)
    torch.testing.assert_close(first.column_weight(), whole.column_weight(), rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.column_weight().double(), reference.root_mean_square([tokens]), rtol=1e-6, atol=0)

"""Laws of block quantisation over random shapes, widths and values."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant import reference
from quant.blockwise import BlockFormat, dequantize, quantize, scales, storage_bits
from quant.codebook import encode, normal_float
from quant.decompose import decompose
from quant.moments import DiagonalMoments
from quant.pack import pack, unpack
from quant.storage import packed_columns

BITS = st.sampled_from([2, 3, 4, 8])
SEEDS = st.integers(0, 2**31 - 1)
SCALE_DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])

settings.register_profile("quant", deadline=None, derandomize=True, max_examples=60)
QUANT = settings.get_profile("quant")


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def _problems(draw):
    """A format and a matrix it fits: sizes, spread of magnitudes and zeroed blocks all vary."""
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16, 32]))
    blocks, rows = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    superblock = draw(st.sampled_from([None, 1, blocks * rows]))
    fmt = BlockFormat(draw(BITS), block_size, draw(BITS), draw(SCALE_DTYPES), superblock)
    generator = _generator(draw(SEEDS))
    weight = torch.randn(rows, blocks, block_size, generator=generator)
    weight *= 10 ** (draw(st.integers(0, 4)) * (torch.rand(rows, blocks, 1, generator=generator) - 1))
    weight *= torch.rand(rows, blocks, 1, generator=generator) > draw(st.sampled_from([0.0, 0.3, 1.0]))
    return fmt, weight.view(rows, -1)


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
    x = (torch.rand(500, generator=_generator(seed)) * 2.4 - 1.2).sort().values
    assert bool((encode(x, codebook).int().diff() >= 0).all())
    assert torch.equal(encode(codebook, codebook), torch.arange(2**bits).to(torch.uint8))


@QUANT
@given(levels=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=20, unique=True), seed=SEEDS)
def test_encode_agrees_with_bisection_on_any_codebook(levels, seed):
    codebook = torch.tensor(sorted(levels))
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    x = torch.cat([torch.rand(200, generator=_generator(seed)) * 2.4 - 1.2, midpoints, codebook])
    assert torch.equal(encode(x, codebook), torch.bucketize(x, midpoints).to(torch.uint8))


@QUANT
@given(problem=_problems())
def test_quantising_is_finite_bounded_and_stays_in_range(problem):
    fmt, weight = problem
    rows = len(weight)
    quantized = quantize(weight, fmt)
    assert int(quantized.codes.max()) < 2**fmt.bits
    assert int(quantized.scale_codes.max()) < 2**fmt.scale_bits
    scale = scales(quantized.scale_codes, quantized.scale_max, quantized.scale_offset, fmt)
    rebuilt = dequantize(quantized.codes, scale, fmt.bits)
    assert bool(torch.isfinite(rebuilt).all())
    absmax = weight.view(rows, -1, fmt.block_size).abs().amax(dim=-1)
    gap = normal_float(fmt.bits).diff().max()
    # fp32 rounding of value / scale * scale: a few ulps of the block's largest value.
    bound = (gap / 2 * scale + (absmax - scale).clamp(min=0) + 1e-6 * absmax).repeat_interleave(fmt.block_size, 1)
    assert bool(((weight - rebuilt).abs() <= bound).all())


@QUANT
@given(problem=_problems())
def test_storage_equals_the_stored_tensors(problem):
    fmt, weight = problem
    quantized = quantize(weight, fmt)
    scale_codes = quantized.scale_codes if fmt.scale_bits == 8 else pack(quantized.scale_codes, fmt.scale_bits)
    stored = [pack(quantized.codes, fmt.bits), scale_codes, quantized.scale_max, quantized.scale_offset]
    assert storage_bits(*weight.shape, fmt) == 8 * sum(tensor.nbytes for tensor in stored)


@QUANT
@given(problem=_problems(), seed=SEEDS)
def test_slicing_rows_commutes_with_dequantising(problem, seed):
    fmt, weight = problem
    fmt = BlockFormat(fmt.bits, fmt.block_size, fmt.scale_bits, fmt.scale_dtype)
    quantized = quantize(weight, fmt)
    whole = scales(quantized.scale_codes, quantized.scale_max, quantized.scale_offset, fmt)
    kept = torch.randperm(len(weight), generator=_generator(seed))[: max(1, len(weight) // 2)]
    sliced = scales(quantized.scale_codes[kept], quantized.scale_max[kept], quantized.scale_offset, fmt)
    assert torch.equal(sliced, whole[kept])
    rebuilt = dequantize(quantized.codes, whole, fmt.bits)
    assert torch.equal(dequantize(quantized.codes[kept], sliced, fmt.bits), rebuilt[kept])


@QUANT
@given(problem=_problems(), exponent=st.integers(-3, 3))
def test_powers_of_two_pass_through(problem, exponent):
    fmt, weight = problem
    fmt = BlockFormat(fmt.bits, fmt.block_size, fmt.scale_bits, torch.float32, fmt.superblock)
    factor = 2.0**exponent
    one, two = quantize(weight, fmt), quantize(factor * weight, fmt)
    # Only the absolute threshold under which a spread of scales counts as none can tell the two apart.
    if bool(((one.scale_max == 0) | (one.scale_max > 1e-6)).all()):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale_codes, two.scale_codes)
        assert torch.equal(factor * one.scale_max, two.scale_max)


@settings(QUANT, max_examples=20)
@given(seed=SEEDS, bits=BITS, rank=st.integers(0, 12), patience=st.integers(1, 3))
def test_decomposition_keeps_its_best_iterate(seed, bits, rank, patience):
    weight = torch.randn(24, 32, generator=_generator(seed))
    fmt = BlockFormat(bits, 16)
    result = decompose(weight, fmt, rank, generator=_generator(seed), max_iterations=6, patience=patience)
    quantized = result.quantized
    scale = scales(quantized.scale_codes, quantized.scale_max, quantized.scale_offset, fmt)
    rebuilt = dequantize(quantized.codes, scale, bits) + result.left.float() @ result.right.float()
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

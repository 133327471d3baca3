import pytest
import torch

from quant import reference
from quant.blockwise import dequantize, encode_block, quantize, rebuild
from quant.codebook import levels_of, normal_float
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.scales import StoredScales, scales
from quant.storage import SEARCHED, Choice


def _weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _scales(quantized, choice):
    return scales(quantized.scales, choice)


def test_shapes_and_dtypes():
    fmt = Choice("nf", 4, 32, 0, scale_dtype="float16")
    quantized = quantize(_weight(6, 128), fmt)
    assert (quantized.codes.shape, quantized.codes.dtype) == ((6, 128), torch.uint8)
    assert (quantized.scales.values.shape, quantized.scales.values.dtype) == ((6, 4), torch.uint8)
    assert (quantized.scales.maximum.shape, quantized.scales.maximum.dtype) == ((6,), torch.float16)
    assert (quantized.scales.offset.shape, quantized.scales.offset.dtype) == ((1,), torch.float32)
    assert _scales(quantized, fmt).shape == (6, 4)


def test_offset_is_the_smallest_absmax():
    weight = _weight(6, 128)
    absmax = weight.view(6, 4, 32).abs().amax(-1)
    assert quantize(weight, Choice("nf", 4, 32, 0)).scales.offset.item() == absmax.min().item()


def test_ragged_and_mistyped_weights_are_refused():
    with pytest.raises(ShapeError, match="blocks of 64"):
        quantize(_weight(4, 100), Choice("nf", 4, 64, 0))
    with pytest.raises(ShapeError, match="superblocks of 3"):
        quantize(_weight(4, 128), Choice("nf", 4, 64, 0, superblock=3))
    with pytest.raises(ShapeError, match="rows, columns"):
        quantize(_weight(4, 128)[0], Choice("nf", 4, 64, 0))
    with pytest.raises(ShapeError, match="0 blocks"):
        quantize(torch.empty(0, 64), Choice("nf", 4, 64, 0))
    with pytest.raises(QuantError, match="float32"):
        quantize(_weight(4, 128).bfloat16(), Choice("nf", 4, 64, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(bad):
    weight = _weight(4, 128)
    weight[2, 77] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        quantize(weight, Choice("nf", 4, 64, 0))


def test_scale_range_beyond_its_dtype_is_refused():
    weight = _weight(2, 128)
    weight[0, 0] = 1e6
    with pytest.raises(NonFiniteError, match=r"torch\.float16"):
        quantize(weight, Choice("nf", 4, 64, 0, scale_dtype="float16"))
    quantize(weight, Choice("nf", 4, 64, 0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_matrix(bits):
    fmt = Choice("nf", bits, 16, 0)
    quantized = quantize(torch.zeros(3, 64), fmt)
    assert quantized.codes.unique().tolist() == [2 ** (bits - 1) - 1]
    assert quantized.scales.values.unique().tolist() == [0]
    assert torch.equal(rebuild(quantized, fmt), torch.zeros(3, 64))


def test_zero_block_among_others():
    weight = _weight(3, 64)
    weight[1, 16:32] = 0
    fmt = Choice("nf", 4, 16, 0)
    quantized = quantize(weight, fmt)
    assert quantized.scales.offset.item() == 0
    assert quantized.codes[1, 16:32].unique().tolist() == [7]
    rebuilt = rebuild(quantized, fmt)
    assert bool(torch.isfinite(rebuilt).all())
    assert not rebuilt[1, 16:32].any()
    assert bool(rebuilt[1, :16].any())


def test_block_whose_scale_rounds_to_zero():
    weight = torch.ones(1, 48)
    weight[0, :16] = 0
    weight[0, 16:32] = 1e-4
    quantized = quantize(weight, Choice("nf", 3, 16, 0))
    assert quantized.scales.values.tolist() == [[0, 0, 255]]
    assert quantized.codes[0, 16:32].unique().tolist() == [3]


def test_equal_scales_in_a_superblock():
    weight = torch.sign(_weight(2, 64)) * 0.25
    weight[1] *= 2
    fmt = Choice("nf", 4, 16, 0)
    quantized = quantize(weight, fmt)
    assert quantized.scales.maximum.tolist() == [0.0, 0.25]
    assert quantized.scales.values.tolist() == [[0] * 4, [255] * 4]
    assert torch.equal(rebuild(quantized, fmt), weight)


def test_differences_at_the_threshold_are_dropped():
    weight = torch.full((2, 4), 0.0)
    weight[1] = 2.0**-24
    assert quantize(weight, Choice("nf", 4, 4, 0, superblock=2)).scales.values.tolist() == [[0], [0]]
    weight[1] = 2.0**-23
    assert quantize(weight, Choice("nf", 4, 4, 0, superblock=2)).scales.values.tolist() == [[0], [255]]


def test_row_slicing_commutes():
    choice = Choice("nf", 3, 32, 0, 4)
    quantized = quantize(_weight(8, 128), choice)
    rows, stored = torch.tensor([5, 1, 6]), quantized.scales
    sliced = scales(StoredScales(stored.values[rows], stored.maximum[rows], stored.offset), choice)
    assert torch.equal(sliced, _scales(quantized, choice)[rows])
    assert torch.equal(dequantize(quantized.codes[rows], sliced, quantized.levels), rebuild(quantized, choice)[rows])


def test_column_slicing_by_whole_blocks_commutes():
    fmt = Choice("nf", 3, 32, 0)
    quantized = quantize(_weight(8, 128), fmt)
    kept = dequantize(quantized.codes[:, 32:96], _scales(quantized, fmt)[:, 1:3], quantized.levels)
    assert torch.equal(kept, rebuild(quantized, fmt)[:, 32:96])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "blocks"), [(3, 64, 4), (2, 15, 5), (700, 512, 8), (1, 6, 1)])
def test_dequantize_is_level_times_scale(bits, rows, columns, blocks):
    # (700, 512) spans chunks and ends in a partial one; 15 columns leave no pairs of codes.
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows, blocks, generator=generator) - 0.5
    levels = torch.randn(2**bits, generator=generator).sort().values
    expected = levels[codes.long()] * scale.repeat_interleave(columns // blocks, dim=1)
    assert torch.equal(dequantize(codes, scale, levels), expected)
    zero = torch.randint(0, 2**bits, (rows, blocks), dtype=torch.uint8, generator=generator)
    integers = torch.arange(2.0**bits)
    shifted = (codes.float() - zero.repeat_interleave(columns // blocks, dim=1)) * scale.repeat_interleave(
        columns // blocks, dim=1
    )
    assert torch.equal(dequantize(codes, scale, integers, zero), shifted)


def test_dequantize_of_views():
    generator = torch.Generator().manual_seed(0)
    levels = normal_float(3)
    codes = torch.randint(0, 8, (1, 2**14 + 1), dtype=torch.uint8, generator=generator)
    scale = torch.rand(1, 4, generator=generator)
    odd = codes[:, 1:]
    assert torch.equal(dequantize(odd, scale, levels), dequantize(odd.clone(), scale, levels))
    tall = torch.randint(0, 8, (2**12, 6), dtype=torch.uint8, generator=generator).T
    wide = torch.rand(4, 6, generator=generator).T
    assert torch.equal(dequantize(tall, wide, levels), dequantize(tall.contiguous(), wide.contiguous(), levels))


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2, 0), (2,)])
def test_dequantize_refuses_scales_that_do_not_fit(shape):
    with pytest.raises(ShapeError, match="does not fit"):
        dequantize(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(shape), normal_float(4))


def test_dequantize_first_called_in_inference_mode_serves_autograd():
    codes, scale = torch.full((2, 2**14), 3, dtype=torch.uint8), torch.ones(2, 1)
    with torch.inference_mode():
        dequantize(codes, scale, normal_float(2))
    x = torch.ones(2**14, requires_grad=True)
    (dequantize(codes, scale, normal_float(2)) @ x).sum().backward()
    assert x.grad.unique().tolist() == [2.0]


GRIDS = ["nf", "lloyd", "int", "uint"]
SCALES = [{}, {"scale_bits": 3, "superblock": 8}, {"scale_bits": 16, "scale_dtype": "float16"}]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("stored", SCALES)
def test_agrees_with_the_float64_reference(grid, bits, stored):
    # fp32 and float64 may part only where a value sits within rounding of a decision point: allow 1 in 500.
    choice = Choice(grid, bits, 32, 0, **stored)
    weight = _weight(64, 128, seed=bits)
    quantized = quantize(weight, choice)
    codes, values, scale, zero = reference.quantize(weight, choice, quantized.levels)
    same = quantized.scales.values == values
    assert same.float().mean().item() >= 0.99
    torch.testing.assert_close(_scales(quantized, choice).double()[same], scale[same], rtol=1e-6, atol=0)
    assert (quantized.zero is None) == (zero is None) == (grid != "uint")
    if zero is not None:
        same &= quantized.zero == zero
        assert same.float().mean().item() >= 0.99
    of_same = same.repeat_interleave(32, 1)
    assert (quantized.codes != codes)[of_same].float().mean().item() <= 2e-3
    rebuilt = dequantize(codes, scale.float(), quantized.levels, zero)
    expected = reference.dequantize(codes, scale, quantized.levels, zero)
    torch.testing.assert_close(rebuilt.double(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_integers_use_their_extra_code_when_the_negative_side_needs_it(bits):
    half, choice = 2 ** (bits - 1), Choice("int", bits, 4, 0, 32, "float32")
    weight = torch.tensor([[-float(half), 0.0, 0.0, 1.0], [0.0, 0.0, -1.0, half - 1.0]])
    quantized = quantize(weight, choice)
    assert quantized.scales.values.flatten().tolist() == [1.0, 1.0]
    assert torch.equal(quantized.levels, torch.arange(-half, half).float())
    assert quantized.codes.tolist() == [[0, half, half, half + 1], [half, half, half - 1, 2 * half - 1]]
    assert torch.equal(rebuild(quantized, choice), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_asymmetric_integers_span_the_range_and_zero(bits):
    last, choice = 2**bits - 1, Choice("uint", bits, 4, 0, 32, "float32")
    weight = torch.tensor([[-1.0, 0.0, 1.0, last - 1.0], [0.0, 1.0, 2.0, last], [-last, -2.0, -1.0, -1.0]])
    quantized = quantize(weight, choice)
    assert quantized.scales.values.flatten().tolist() == [1.0] * 3
    assert quantized.zero.flatten().tolist() == [1, 0, last]
    assert torch.equal(rebuild(quantized, choice), weight)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("stored", SCALES)
@pytest.mark.parametrize("value", [0.0, 0.75, -0.75, 1e-30])
def test_degenerate_blocks_are_finite_and_zero_stays_zero(grid, stored, value):
    """All-equal matrices, zero blocks beside others, and scales too small for their dtype."""
    choice = Choice(grid, 3, 16, 0, **stored)
    weight = torch.full((4, 32), value)
    weight[1, :16] = 0
    found = rebuild(quantize(weight, choice), choice)
    assert bool(torch.isfinite(found).all())
    assert not found[1, :16].any()
    if abs(value) == 0.75:
        # 2**-8: the rounding of a bfloat16 maximum.
        torch.testing.assert_close(found[2:], weight[2:], rtol=2**-8, atol=0)


def test_scales_too_small_for_their_dtype_are_zero():
    quantized = quantize(torch.full((1, 16), 1e-9), Choice("int", 4, 16, 0, 16, "float16"))
    assert quantized.scales.values.tolist() == [[0.0]]
    assert quantized.codes.unique().tolist() == [8]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_encode_block_inverts_dequantize_at_any_scale(grid, sign):
    generator = torch.Generator().manual_seed(1)
    levels = levels_of(Choice(grid, 3, 16, 0))
    codes = torch.randint(0, 8, (40, 48), dtype=torch.uint8, generator=generator)
    zero = torch.randint(0, 8, (40, 3), dtype=torch.uint8, generator=generator) if grid == "uint" else None
    scale = sign * (torch.rand(40, 3, generator=generator) + 0.1)
    values = dequantize(codes, scale, levels, zero)
    assert torch.equal(encode_block(values, scale, levels, zero), codes)
    # One column of a block at a time, as error-compensated rounding does.
    column = encode_block(values[:, 17:18].contiguous(), scale[:, 1:2], levels, None if zero is None else zero[:, 1:2])
    assert torch.equal(column, codes[:, 17:18])
    with pytest.raises(ShapeError, match="does not fit"):
        encode_block(values, scale[:, :2].repeat(1, 5), levels)


def test_levels_of_the_callers_own():
    levels = torch.tensor([-0.9, -0.1, 0.2, 1.0])
    choice = Choice("lloyd", 2, 16, 0)
    quantized = quantize(_weight(8, 64), choice, levels)
    assert torch.equal(quantized.levels, levels)
    codes, _, _, _ = reference.quantize(_weight(8, 64), choice, levels)
    assert torch.equal(quantized.codes, codes)
    for bad, complaint in (
        (levels.flip(0), "increasing"),
        (levels[:3], r"\[4\]"),
        (levels.double(), "float32"),
        (torch.tensor([-1, 0, 1, float("inf")]), "finite"),
    ):
        with pytest.raises(QuantError, match=complaint):
            quantize(_weight(8, 64), choice, bad)
    with pytest.raises(QuantError, match="leave levels out"):
        quantize(_weight(8, 64), Choice("int", 2, 16, 0), levels)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_scales_are_the_best_of_those_tried(grid, bits):
    choice = Choice(grid, bits, 16, 0, 32, "float32")
    weight = _weight(12, 64)
    weight[3, 16:32] = 0
    weight[4, 5] = 40.0
    levels = levels_of(choice, SEARCHED)
    quantized = quantize(weight, choice, multiples=SEARCHED)
    own = levels if grid in ("nf", "lloyd") else None
    codes, _, scale, zero = reference.quantize(weight, choice, own, SEARCHED)
    torch.testing.assert_close(_scales(quantized, choice).double(), scale, rtol=1e-6, atol=0)
    assert torch.equal(quantized.codes, codes)
    assert (zero is None) == (quantized.zero is None)
    assert zero is None or torch.equal(quantized.zero, zero)
    whole = quantize(weight, choice, own)
    errors = [(rebuild(found, choice) - weight).view(-1, 16).square().sum(dim=1) for found in (quantized, whole)]
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    # At 4 bits, blocks as small as these are better whole than a tenth smaller.
    assert bits == 4 or bool((errors[0] < errors[1] * 0.99).any())


def test_a_row_longer_than_a_chunk_is_searched_too():
    choice = Choice("lloyd", 2, 64, 0, 32, "float32")
    weight = _weight(2, 1 << 17)
    found = quantize(weight, choice, multiples=SEARCHED)
    halves = [quantize(half.contiguous(), choice, multiples=SEARCHED) for half in weight.chunk(2, dim=1)]
    assert torch.equal(found.codes, torch.cat([half.codes for half in halves], dim=1))

import pytest
import torch

from quant import reference
from quant.blockwise import BlockFormat, dequantize, quantize, scales, storage_bits
from quant.codebook import normal_float
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.pack import pack


def _weight(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _scales(quantized, fmt):
    return scales(quantized.scale_codes, quantized.scale_max, quantized.scale_offset, fmt)


def _rebuilt(quantized, fmt):
    return dequantize(quantized.codes, _scales(quantized, fmt), fmt.bits)


def test_format_names_and_values():
    assert BlockFormat(3, 64).name == "nf3-b64-s8-bfloat16"
    assert BlockFormat(4, 16, 4, torch.float32, 256).name == "nf4-b16-s4-float32-S256"
    assert BlockFormat(3, 64).blocks_per_superblock(640) == 10
    assert BlockFormat(3, 64, superblock=4).blocks_per_superblock(640) == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"bits": 5}, "bits must"),
        ({"block_size": 0}, "block_size"),
        ({"scale_bits": 1}, "scale_bits"),
        ({"scale_dtype": torch.int8}, "scale_dtype"),
        ({"superblock": 0}, "superblock"),
    ],
)
def test_bad_formats_are_refused(arguments, complaint):
    with pytest.raises(QuantError, match=complaint):
        BlockFormat(**({"bits": 4, "block_size": 64} | arguments))


def test_shapes_and_dtypes():
    fmt = BlockFormat(4, 32, scale_dtype=torch.float16)
    quantized = quantize(_weight(6, 128), fmt)
    assert (quantized.codes.shape, quantized.codes.dtype) == ((6, 128), torch.uint8)
    assert (quantized.scale_codes.shape, quantized.scale_codes.dtype) == ((6, 4), torch.uint8)
    assert (quantized.scale_max.shape, quantized.scale_max.dtype) == ((6,), torch.float16)
    assert (quantized.scale_offset.shape, quantized.scale_offset.dtype) == ((1,), torch.float32)
    assert _scales(quantized, fmt).shape == (6, 4)


def test_offset_is_the_smallest_absmax():
    weight = _weight(6, 128)
    absmax = weight.view(6, 4, 32).abs().amax(-1)
    assert quantize(weight, BlockFormat(4, 32)).scale_offset.item() == absmax.min().item()


def test_ragged_and_mistyped_weights_are_refused():
    with pytest.raises(ShapeError, match="blocks of 64"):
        quantize(_weight(4, 100), BlockFormat(4, 64))
    with pytest.raises(ShapeError, match="superblocks of 3"):
        quantize(_weight(4, 128), BlockFormat(4, 64, superblock=3))
    with pytest.raises(ShapeError, match="rows, columns"):
        quantize(_weight(4, 128)[0], BlockFormat(4, 64))
    with pytest.raises(ShapeError, match="0 blocks"):
        quantize(torch.empty(0, 64), BlockFormat(4, 64))
    with pytest.raises(QuantError, match="float32"):
        quantize(_weight(4, 128).bfloat16(), BlockFormat(4, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(bad):
    weight = _weight(4, 128)
    weight[2, 77] = bad
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        quantize(weight, BlockFormat(4, 64))


def test_scale_range_beyond_its_dtype_is_refused():
    weight = _weight(2, 128)
    weight[0, 0] = 1e6
    with pytest.raises(NonFiniteError, match=r"torch\.float16"):
        quantize(weight, BlockFormat(4, 64, scale_dtype=torch.float16))
    quantize(weight, BlockFormat(4, 64))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_matrix(bits):
    fmt = BlockFormat(bits, 16)
    quantized = quantize(torch.zeros(3, 64), fmt)
    assert quantized.codes.unique().tolist() == [2 ** (bits - 1) - 1]
    assert quantized.scale_codes.unique().tolist() == [0]
    assert torch.equal(_rebuilt(quantized, fmt), torch.zeros(3, 64))


def test_zero_block_among_others():
    weight = _weight(3, 64)
    weight[1, 16:32] = 0
    fmt = BlockFormat(4, 16)
    quantized = quantize(weight, fmt)
    assert quantized.scale_offset.item() == 0
    assert quantized.codes[1, 16:32].unique().tolist() == [7]
    rebuilt = _rebuilt(quantized, fmt)
    assert bool(torch.isfinite(rebuilt).all())
    assert not rebuilt[1, 16:32].any()
    assert bool(rebuilt[1, :16].any())


def test_block_whose_scale_rounds_to_zero():
    weight = torch.ones(1, 48)
    weight[0, :16] = 0
    weight[0, 16:32] = 1e-4
    quantized = quantize(weight, BlockFormat(3, 16))
    assert quantized.scale_codes.tolist() == [[0, 0, 255]]
    assert quantized.codes[0, 16:32].unique().tolist() == [3]


def test_equal_scales_in_a_superblock():
    weight = torch.sign(_weight(2, 64)) * 0.25
    weight[1] *= 2
    fmt = BlockFormat(4, 16)
    quantized = quantize(weight, fmt)
    assert quantized.scale_max.tolist() == [0.0, 0.25]
    assert quantized.scale_codes.tolist() == [[0] * 4, [255] * 4]
    assert torch.equal(_rebuilt(quantized, fmt), weight)


def test_differences_at_the_threshold_are_dropped():
    weight = torch.full((2, 4), 0.0)
    weight[1] = 2.0**-24
    assert quantize(weight, BlockFormat(4, 4, superblock=2)).scale_codes.tolist() == [[0], [0]]
    weight[1] = 2.0**-23
    assert quantize(weight, BlockFormat(4, 4, superblock=2)).scale_codes.tolist() == [[0], [255]]


def test_row_slicing_commutes():
    fmt = BlockFormat(3, 32, 4)
    quantized = quantize(_weight(8, 128), fmt)
    rows = torch.tensor([5, 1, 6])
    sliced = scales(quantized.scale_codes[rows], quantized.scale_max[rows], quantized.scale_offset, fmt)
    assert torch.equal(sliced, _scales(quantized, fmt)[rows])
    assert torch.equal(dequantize(quantized.codes[rows], sliced, 3), _rebuilt(quantized, fmt)[rows])


def test_column_slicing_by_whole_blocks_commutes():
    fmt = BlockFormat(3, 32)
    quantized = quantize(_weight(8, 128), fmt)
    kept = dequantize(quantized.codes[:, 32:96], _scales(quantized, fmt)[:, 1:3], 3)
    assert torch.equal(kept, _rebuilt(quantized, fmt)[:, 32:96])


def test_superblocks_span_rows_in_row_major_order():
    weight = torch.tensor([[1.0, 1.0, 2.0, 2.0], [5.0, 5.0, 9.0, 9.0], [3.0, 3.0, 4.0, 4.0]])
    quantized = quantize(weight, BlockFormat(4, 2, scale_dtype=torch.float32, superblock=3))
    assert quantized.scale_max.tolist() == [4.0, 8.0]
    assert quantized.scale_codes.tolist() == [[0, 64], [255, 255], [64, 96]]


def test_scales_refuse_maxima_of_another_shape():
    fmt = BlockFormat(4, 16)
    quantized = quantize(_weight(4, 64), fmt)
    with pytest.raises(ShapeError, match="maxima"):
        scales(quantized.scale_codes, quantized.scale_max[:3], quantized.scale_offset, fmt)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "blocks"), [(3, 64, 4), (2, 15, 5), (700, 512, 8), (1, 6, 1)])
def test_dequantize_is_level_times_scale(bits, rows, columns, blocks):
    # (700, 512) spans chunks and ends in a partial one; 15 columns leave no pairs of codes.
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = torch.rand(rows, blocks, generator=generator)
    expected = normal_float(bits)[codes.long()] * scale.repeat_interleave(columns // blocks, dim=1)
    assert torch.equal(dequantize(codes, scale, bits), expected)


def test_dequantize_of_views():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (1, 65), dtype=torch.uint8, generator=generator)
    scale = torch.rand(1, 4, generator=generator)
    odd = codes[:, 1:]
    assert torch.equal(dequantize(odd, scale, 3), dequantize(odd.clone(), scale, 3))
    tall = torch.randint(0, 8, (64, 6), dtype=torch.uint8, generator=generator).T
    wide = torch.rand(4, 6, generator=generator).T
    assert torch.equal(dequantize(tall, wide, 3), dequantize(tall.contiguous(), wide.contiguous(), 3))


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2, 0), (2,)])
def test_dequantize_refuses_scales_that_do_not_fit(shape):
    with pytest.raises(ShapeError, match="does not fit"):
        dequantize(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(shape), 4)


def test_dequantize_first_called_in_inference_mode_serves_autograd():
    codes, scale = torch.full((2, 8), 3, dtype=torch.uint8), torch.ones(2, 1)
    with torch.inference_mode():
        dequantize(codes, scale, 2)
    x = torch.ones(8, requires_grad=True)
    (dequantize(codes, scale, 2) @ x).sum().backward()
    assert x.grad.tolist() == [2.0] * 8


@pytest.mark.parametrize("fmt", [BlockFormat(3, 16), BlockFormat(4, 16, 4, superblock=5), BlockFormat(2, 40, 3)])
def test_storage_is_that_of_the_packed_tensors(fmt):
    rows, columns = 10, 80
    quantized = quantize(_weight(rows, columns), fmt)
    scale_codes = quantized.scale_codes if fmt.scale_bits == 8 else pack(quantized.scale_codes, fmt.scale_bits)
    stored = [pack(quantized.codes, fmt.bits), scale_codes, quantized.scale_max, quantized.scale_offset]
    assert storage_bits(rows, columns, fmt) == sum(8 * tensor.nbytes for tensor in stored)


def test_storage_refuses_ragged_shapes():
    with pytest.raises(ShapeError, match="blocks of 64"):
        storage_bits(4, 100, BlockFormat(4, 64))
    with pytest.raises(ShapeError, match="superblocks of 3"):
        storage_bits(4, 128, BlockFormat(4, 64, superblock=3))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_agrees_with_the_float64_reference(bits):
    # fp32 and float64 may part only where a value sits within rounding of a decision point: allow 1 in 1000.
    fmt = BlockFormat(bits, 32, superblock=8)
    weight = _weight(32, 128, seed=bits)
    quantized = quantize(weight, fmt)
    codes, scale_codes, scale = reference.quantize(weight, fmt)
    assert (quantized.scale_codes != scale_codes).float().mean().item() <= 1e-3
    assert (quantized.codes != codes).float().mean().item() <= 1e-3
    same = quantized.scale_codes == scale_codes
    torch.testing.assert_close(_scales(quantized, fmt).double()[same], scale[same], rtol=1e-6, atol=0)
    rebuilt = dequantize(codes, scale.float(), bits)
    torch.testing.assert_close(rebuilt.double(), reference.dequantize(codes, scale, bits), rtol=1e-6, atol=1e-9)

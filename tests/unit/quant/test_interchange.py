"""Integer weights in the layouts of other tools, against golden words and a reader of one long number."""

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from gptq_reader import read_map, read_stream
from torch import Tensor

from quant.codebook import normal_float
from quant.exceptions import QuantError, ShapeError
from quant.grid import dequantize, to_signed
from quant.interchange import (
    bitsandbytes_buffers,
    compressed_tensors_buffers,
    dense_stream,
    gguf_blocks,
    gptq_buffers,
    half_smallest,
    half_steps,
    lora_factors,
    rotary_rows,
    stream_codes,
)
from quant.pack import pack

WIDTHS = (2, 3, 4, 8)
GOLDEN = {
    2: (torch.arange(16) % 4, ["E4E4E4E4"]),
    3: (torch.arange(32) % 8, ["88FAC688", "C688FAC6", "FAC688FA"]),
    4: (torch.arange(8), ["76543210"]),
    8: (torch.arange(1, 5), ["04030201"]),
}
ZEROS = {
    2: (["55555555"] * 2, ["AAAAAAAA"] * 2),
    3: (["DB6DB6DB", "B6DB6DB6", "6DB6DB6D"], ["24924924", "49249249", "92492492"]),
    4: (["77777777"] * 4, ["88888888"] * 4),
    8: (["7F7F7F7F"] * 8, ["80808080"] * 8),
}


def hexadecimal(words: Tensor) -> list[str]:
    return [f"{word % 2**32:08X}" for word in words.tolist()]


def random_map(bits: int, rows: int, columns: int, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their words as we pack them, and steps that fp16 rounds."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    return codes, pack(codes, bits), torch.rand(rows, columns // group, generator=generator) * 0.01 + 1e-3


@pytest.mark.parametrize("bits", WIDTHS)
def test_golden_words(bits: int) -> None:
    codes, words = GOLDEN[bits]
    packed = pack(codes.to(torch.uint8)[None], bits)
    assert hexadecimal(dense_stream(packed, bits, len(codes))[0]) == words
    steps = torch.ones(32, 1).half()
    for zeros, shift in zip(ZEROS[bits], (1, 0), strict=True):
        found = gptq_buffers(pack(torch.zeros(32, 32, dtype=torch.uint8), bits), steps, bits, 32, shift)
        assert hexadecimal(found["qzeros"][0]) == zeros


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1, 32, 43, 96])
def test_the_stream_is_one_long_number(bits: int, columns: int) -> None:
    codes, words, _ = random_map(bits, 5, columns, group=1)
    stream = dense_stream(words, bits, columns)
    assert stream.dtype == torch.int32
    assert stream.shape == (5, -(-columns * bits // 32))
    for row, expected in zip(stream.tolist(), codes.tolist(), strict=True):
        number = sum((word % 2**32) << 32 * place for place, word in enumerate(row))
        assert number == sum(code << bits * place for place, code in enumerate(expected))
    assert torch.equal(stream_codes(stream, bits, columns), codes)
    with pytest.raises(ShapeError, match=f"{columns + 32} codes of {bits} bits do not take {stream.shape[1]} words"):
        stream_codes(stream, bits, columns + 32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_compressed_tensors_keeps_codes_and_steps(bits: int) -> None:
    codes, words, scale = random_map(bits, 6, 96)
    found = compressed_tensors_buffers(words, scale, bits, 32)
    assert found["weight_shape"].tolist() == [6, 96]
    assert torch.equal(found["weight_scale"], scale)
    assert (read_stream(found["weight_packed"], bits)[:, :96] == codes.numpy()).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_gptq_gives_the_weights_of_its_steps(bits: int) -> None:
    codes, words, scale = random_map(bits, 64, 96)
    steps, change = half_steps(words, scale, bits, 32)
    expected = dequantize(to_signed(codes, bits), steps.double(), None)
    for version, shift in (("gptq", 1), ("gptq_v2", 0)):
        stored = gptq_buffers(words, steps, bits, 32, shift)
        assert stored["qweight"].shape == (96 * bits // 32, 64)
        assert stored["g_idx"].tolist() == [column // 32 for column in range(96)]
        found, zeros, weight = read_map({f"x.{key}": value for key, value in stored.items()}, "x", bits, version)
        assert (found == codes.numpy()).all()
        assert (zeros == 2 ** (bits - 1)).all()
        assert (weight == expected.numpy()).all()
    relative = np.abs(steps.double().numpy() / scale.double().numpy() - 1)
    assert change == pytest.approx(relative.max(), rel=1e-3)
    assert 1e-5 < change < 2**-11 + 1e-6


@pytest.mark.parametrize("bits", WIDTHS)
def test_versions_that_are_confused_shift_every_weight_by_one_step(bits: int) -> None:
    _, words, scale = random_map(bits, 32, 64)
    steps = half_steps(words, scale, bits, 32)[0]
    stored = {f"x.{key}": value for key, value in gptq_buffers(words, steps, bits, 32, 0).items()}
    right, wrong = (read_map(stored, "x", bits, version)[2] for version in ("gptq_v2", "gptq"))
    assert (right - wrong == steps.double().repeat_interleave(32, dim=1).numpy()).all()


def test_steps_that_do_not_fit_are_refused_where_they_count() -> None:
    codes = torch.full((2, 64), 8, dtype=torch.uint8)
    scale = torch.full((2, 2), 1e-8)
    assert half_steps(pack(codes, 4), scale, 4, 32)[1] == 0.0
    codes[1, 40] = 9
    with pytest.raises(QuantError, match="float16 has no step for 1e-08"):
        half_steps(pack(codes, 4), scale, 4, 32)
    scale[1, 1], scale[0, 0] = 1e-3, 7e4
    with pytest.raises(QuantError, match="float16 has no step for 70000"):
        half_steps(pack(codes, 4), scale, 4, 32)


@pytest.mark.parametrize(("rows", "columns"), [(48, 32), (32, 48)])
def test_sides_that_gptq_cannot_have(rows: int, columns: int) -> None:
    _, words, scale = random_map(4, rows, columns, group=16)
    with pytest.raises(ShapeError, match=rf"multiples of 32, found \[{rows}, {columns}\]"):
        gptq_buffers(words, scale.half(), 4, 16, 1)


GGUF = {"Q8_0": (8, None), "Q4_0": (4, None), "Q4_1": (4, 0.3)}


@pytest.mark.parametrize("group", [32, 96])
@pytest.mark.parametrize("kind", GGUF)
def test_the_gguf_package_gives_the_weights_of_its_steps(kind: str, group: int) -> None:
    """Every code, the lowest and the highest among them, times its fp16 step, in float64."""
    bits, offset = GGUF[kind]
    codes, words, scale = random_map(bits, 5, 192, group)
    assert (int(codes.min()), int(codes.max())) == (0, 2**bits - 1)
    steps, _ = half_steps(words, scale, bits, group)
    smallest = None if offset is None else half_smallest(scale, offset * scale)[0]
    blocks = gguf_blocks(words, steps, bits, group, smallest)
    found = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    per_weight = (codes.double().numpy(), steps.double().repeat_interleave(group, dim=1).numpy())
    if smallest is None:
        expected = (per_weight[0] - 2 ** (bits - 1)) * per_weight[1]
        assert (np.rint(found / per_weight[1]) + 2 ** (bits - 1) == codes.numpy()).all()
    else:
        expected = per_weight[0] * per_weight[1] + smallest.double().repeat_interleave(group, dim=1).numpy()
    assert (found == expected.astype(np.float32)).all()


def test_a_gguf_block_byte_by_byte() -> None:
    """Step 1.0 is 3C00 and -8.0 C800 in fp16; byte j holds codes j and j + 16."""
    words = pack(torch.arange(32, dtype=torch.uint8)[None] % 16, 4)
    one, least = torch.ones(1, 1).half(), torch.full((1, 1), -8.0).half()
    nibbles = "".join(f"{code:X}{code:X}" for code in range(16))
    assert gguf_blocks(words, one, 4, 32)[0].numpy().tobytes().hex().upper() == f"003C{nibbles}"
    assert gguf_blocks(words, one, 4, 32, least)[0].numpy().tobytes().hex().upper() == f"003C00C8{nibbles}"
    octets = pack(torch.tensor([[0, 1, 127, 128, 255] + [128] * 27], dtype=torch.uint8), 8)
    assert gguf_blocks(octets, one, 8, 32)[0].numpy().tobytes()[2:7].hex() == "8081ff007f"


def test_the_smallest_weights_of_gguf_say_what_they_lost() -> None:
    scale, offset = torch.tensor([[0.01, 0.02]]), torch.tensor([[0.003, -0.001]])
    smallest, change = half_smallest(scale, offset)
    exact = offset.double() - 8 * scale.double()
    assert change == pytest.approx(float(((smallest.double() - exact).abs() / scale.double()).max()), rel=1e-3)
    assert 0 < change < 8 * 2**-11
    for wrong, says in ((1e4, "-80000"), (1e-8, "-8e-08")):
        with pytest.raises(QuantError, match=f"float16 has no {says} for the smallest weight"):
            half_smallest(torch.full((1, 1), wrong), torch.zeros(1, 1))


def test_what_gguf_blocks_cannot_be_is_refused() -> None:
    steps = torch.ones(1, 2).half()
    with pytest.raises(QuantError, match=r"for 4 and 8 bits, .* not for 2"):
        gguf_blocks(pack(torch.zeros(1, 64, dtype=torch.uint8), 2), steps, 2, 32)
    with pytest.raises(QuantError, match="smallest weights for 4, not for 8"):
        gguf_blocks(pack(torch.zeros(1, 64, dtype=torch.uint8), 8), steps, 8, 32, steps)
    with pytest.raises(ShapeError, match="multiples of 32, found 16"):
        gguf_blocks(pack(torch.zeros(1, 32, dtype=torch.uint8), 4), steps, 4, 16)
    with pytest.raises(ShapeError, match="12 rows are no heads of 8"):
        rotary_rows(12, 8)


def test_halves_of_a_head_become_neighbours() -> None:
    assert rotary_rows(12, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("block", [32, 64])
def test_bitsandbytes_gives_the_weights_of_its_codes(block: int) -> None:
    """Its levels are written out with fewer digits than ours, 2^-23 apart at most."""
    codes, _, scale = random_map(4, 6, 128, block)
    found = bitsandbytes_buffers(codes, scale, normal_float(4))
    assert found["weight"][:3, 0].tolist() == [16 * int(codes[0, 2 * k]) + int(codes[0, 2 * k + 1]) for k in range(3)]
    state = QuantState(found["weight.absmax"], codes.shape, found["weight.quant_map"], block, "nf4", torch.float32)
    expected = scale.double().repeat_interleave(block, dim=1) * get_4bit_type("nf4", device="cpu").double()[codes.int()]
    assert torch.equal(dequantize_4bit(found["weight"], state), expected.float())
    assert torch.equal(found["weight.quant_map"], normal_float(4))
    with pytest.raises(QuantError, match="the 16 levels of NormalFloat alone"):
        bitsandbytes_buffers(codes, scale, torch.linspace(-1, 1, 16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_low_rank_parts_are_lora_factors(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = ((10 * torch.randn(size, generator=generator)).to(dtype) for size in ((6, 3), (3, 8)))
    buffers = {"lowrank_left": left, "lowrank_right": right}
    scale = torch.rand(3, generator=generator) if dtype == torch.int8 else torch.ones(3)
    lora_a, lora_b = lora_factors(buffers | ({"lowrank_scale": scale} if dtype == torch.int8 else {}))
    expected = left.double() @ torch.diag(scale.double()) @ right.double()
    torch.testing.assert_close((lora_b @ lora_a).double(), expected, rtol=1e-5, atol=1e-4)

"""Integer weights in the layouts of other tools: codes are moved, never found again.

Both layouts pack codes ``u = q + 2**(bits - 1)`` into 32-bit words, the first code in the least significant bits. At
2, 4 and 8 bits that is what ``quant.pack`` does; at 3 bits a code may straddle two words, 32 codes to three of them.
compressed-tensors packs along the input of a matrix [out, in]; GPTQ stores the transpose, still packed along the input,
and its zero points packed along the output. GGUF has blocks of 32 weights along the input, each with its step before
its codes. bitsandbytes has the codes of a matrix as one row, two to a byte, the first in the high half.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quant.codebook import normal_float
from quant.exceptions import QuantError, ShapeError
from quant.grid import bounds
from quant.pack import pack, unpack
from quant.storage import GGUF_BLOCK, GPTQ_MULTIPLE, WORD_BITS

_LEVEL_SLACK = 2e-7


def dense_stream(words: Tensor, bits: int, columns: int) -> Tensor:
    """The same codes as one stream of bits, row by row.

    Args:
        words: int32 [rows, packed_columns(columns, bits)], as ``quant.pack`` writes them.

    Returns:
        int32 [rows, ceil(columns * bits / 32)], zeros behind the last code; ``words`` itself where that is the same.

    Peak bytes at 3 bits: 5 for each code.
    """
    if bits != 3:
        return words
    codes = unpack(words, bits, words.shape[1] // 3 * WORD_BITS)
    digits = codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)
    octets = digits.bitwise_and_(1).view(len(codes), -1, 8)
    octets <<= torch.arange(8, dtype=torch.uint8, device=codes.device)
    stream = octets.sum(dim=-1, dtype=torch.uint8).view(torch.int32)
    return stream[:, : -(-columns * bits // WORD_BITS)].contiguous()


def stream_codes(stream: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of ``dense_stream`` and ``pack`` together: uint8 codes [rows, columns] from int32 [rows, words].

    Raises:
        ShapeError: ``words`` is not ceil(columns * bits / 32).

    Peak bytes: 8 for each byte of ``stream``, and as many again.
    """
    if stream.shape[1] != -(-columns * bits // WORD_BITS):
        raise ShapeError(f"{columns} codes of {bits} bits do not take {stream.shape[1]} words")
    octets = stream.contiguous().view(torch.uint8).unsqueeze(-1)
    digits = (octets >> torch.arange(8, dtype=torch.uint8, device=stream.device)).bitwise_and_(1)
    digits = digits.view(len(stream), -1)[:, : columns * bits].reshape(len(stream), columns, bits)
    digits <<= torch.arange(bits, dtype=torch.uint8, device=stream.device)
    return digits.sum(dim=-1, dtype=torch.uint8)


def compressed_tensors_buffers(words: Tensor, scale: Tensor, bits: int, group_size: int) -> dict[str, Tensor]:
    """One linear map as ``pack-quantized`` of compressed-tensors has it, symmetric: W = q * scale, exactly.

    Args:
        words: int32 [out, packed_columns(in, bits)]. scale: fp32 [out, in // group_size].

    Returns:
        ``weight_packed`` int32 [out, ceil(in * bits / 32)], ``weight_scale`` fp32 as given, ``weight_shape`` int64 [2].
    """
    columns = scale.shape[1] * group_size
    return {
        "weight_packed": dense_stream(words, bits, columns),
        "weight_scale": scale,
        "weight_shape": torch.tensor([len(scale), columns]),
    }


def gptq_buffers(words: Tensor, steps: Tensor, bits: int, group_size: int, zero_shift: int) -> dict[str, Tensor]:
    """One linear map as GPTQ checkpoints have it, symmetric: W.T[k] = scales[g_idx[k]] * (u[k] - 2**(bits - 1)).

    Args:
        words: int32 [out, packed_columns(in, bits)]. steps: fp16 [out, in // group_size], see ``half_steps``.
        zero_shift: what readers add to a stored zero point: 1 in the first version of the format, 0 in the second.

    Returns:
        ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32], ``scales`` fp16
        [groups, out], ``g_idx`` int32 [in].

    Raises:
        ShapeError: a side is no multiple of ``GPTQ_MULTIPLE``.
    """
    (rows, groups), columns = steps.shape, steps.shape[1] * group_size
    if rows % GPTQ_MULTIPLE or columns % GPTQ_MULTIPLE:
        raise ShapeError(f"GPTQ needs sides that are multiples of {GPTQ_MULTIPLE}, found {[rows, columns]}")
    zeros = torch.full((groups, rows), -bounds(bits)[0] - zero_shift, dtype=torch.uint8)
    return {
        "qweight": dense_stream(words, bits, columns).T.contiguous(),
        "qzeros": dense_stream(pack(zeros, bits), bits, rows),
        "scales": steps.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // group_size,
    }


def gguf_blocks(words: Tensor, steps: Tensor, bits: int, group_size: int, smallest: Tensor | None = None) -> Tensor:
    """One linear map as blocks of GGUF: Q8_0 at 8 bits, W = q * step, and at 4 bits Q4_0, W = (u - 8) * step, or with
    ``smallest`` Q4_1, W = u * step + smallest.

    Args:
        words: int32 [out, packed_columns(in, bits)]. steps: fp16 [out, in // group_size], see ``half_steps``.
        smallest: fp16 like ``steps``, the weight of the lowest code, see ``half_smallest``; at 4 bits alone.

    Returns:
        uint8 [out, bytes]: to every 32 weights a step (and a smallest weight) and 32 int8, or 16 bytes with the codes
        of weights j and j + 16 in the low and the high half of byte j (the ggml project: block_q8_0, block_q4_0,
        block_q4_1). A group of several blocks has its step in each.

    Raises:
        ShapeError: ``group_size`` is no multiple of 32. QuantError: another width.

    Peak bytes: 4 for each code.
    """
    if bits not in (4, 8) or (smallest is not None and bits != 4):
        raise QuantError(f"GGUF has steps for 4 and 8 bits, and smallest weights for 4, not for {bits}")
    if group_size % GGUF_BLOCK:
        raise ShapeError(f"GGUF needs groups that are multiples of {GGUF_BLOCK}, found {group_size}")
    rows, groups = steps.shape
    blocks = groups * group_size // GGUF_BLOCK
    codes = unpack(words, bits, groups * group_size).view(rows, blocks, GGUF_BLOCK)
    if bits == 8:
        stored = (codes - 128).view(torch.uint8)  # uint8 wraps: the bytes of the signed code
    else:
        low, high = codes.chunk(2, dim=-1)
        stored = low | high << 4
    heads = [steps] if smallest is None else [steps, smallest]
    numbers = torch.stack(heads, dim=-1).repeat_interleave(group_size // GGUF_BLOCK, dim=1)
    return torch.cat([numbers.view(torch.uint8), stored], dim=-1).view(rows, -1)


def half_smallest(scale: Tensor, offset: Tensor) -> tuple[Tensor, float]:
    """Weights of code 0 of 4 bits, ``offset - 8 * scale``, in fp16, and the largest change of one, in steps.

    Args:
        scale, offset: fp32 [out, groups].

    Raises:
        QuantError: one would be infinite, or a step 0.
    """
    exact = offset - 8 * scale
    half = exact.half()
    lost = half.isinf() | (scale.half() == 0)
    if bool(lost.any()):
        raise QuantError(f"float16 has no {float(exact[lost][0]):g} for the smallest weight of a group")
    return half, float(((half.to(scale.dtype) - exact).abs() / scale).max())


def bitsandbytes_buffers(codes: Tensor, scale: Tensor, levels: Tensor) -> dict[str, Tensor]:
    """One matrix as bitsandbytes has its NF4: W = scale * levels[code], blocks along the input.

    Args:
        codes: uint8 [out, in], below 16. scale: fp32 [out, blocks]. levels: fp32 [16].

    Returns:
        ``weight`` uint8 [out * in / 2, 1], ``weight.absmax`` fp32 [out * blocks], ``weight.quant_map`` fp32 [16].

    Raises:
        QuantError: the levels are not those of NormalFloat, which its kernels have built in (to 2e-7).
    """
    if levels.shape != (16,) or float((levels - normal_float(4).to(levels.device)).abs().max()) > _LEVEL_SLACK:
        raise QuantError("bitsandbytes knows the 16 levels of NormalFloat alone, found others")
    pairs = codes.reshape(-1, 2)
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": scale.reshape(-1),
        "weight.quant_map": levels,
    }


def lora_factors(buffers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The low-rank part of a packed map as LoRA has it: A fp32 [rank, in] and B fp32 [out, rank], L1 L2 = B A."""
    left = buffers["lowrank_left"].float()
    if "lowrank_scale" in buffers:
        left = left * buffers["lowrank_scale"]
    return buffers["lowrank_right"].float(), left


def rotary_rows(rows: int, head_dim: int, device: torch.device | None = None) -> Tensor:
    """int64 [rows]: which row of q or k, as checkpoints of transformers have them, stands where in a GGUF file of the
    family llama. Rotary pairs are the two halves of a head in the first, neighbours in the second.

    Raises:
        ShapeError: the rows are no whole heads of an even width.
    """
    if head_dim % 2 or rows % head_dim:
        raise ShapeError(f"{rows} rows are no heads of {head_dim}, in pairs")
    return torch.arange(rows, device=device).view(-1, 2, head_dim // 2).transpose(1, 2).reshape(-1)


def half_steps(
    words: Tensor, scale: Tensor, bits: int, group_size: int, *, unsigned: bool = False
) -> tuple[Tensor, float]:
    """Steps in fp16, and the largest relative change of one that any code other than 0 is multiplied with.

    Args:
        words: int32 [out, packed_columns(in, bits)]. scale: [out, in // group_size].
        unsigned: steps are multiplied with the codes as they are stored, from 0 on, and the smallest weight is added.

    Raises:
        QuantError: such a step would be 0, or any would be infinite.
    """
    half = scale.half()
    codes = unpack(words, bits, scale.shape[1] * group_size).view(*scale.shape, group_size)
    used = (codes != (0 if unsigned else -bounds(bits)[0])).any(dim=-1)
    lost = half.isinf() | (used & (half == 0))
    if bool(lost.any()):
        raise QuantError(f"float16 has no step for {float(scale[lost][0]):g}")
    change = ((half.to(scale.dtype) - scale).abs() / scale)[used]
    return half, float(change.max()) if change.numel() else 0.0

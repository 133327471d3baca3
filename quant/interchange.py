"""Integer weights in the layouts of other tools: codes are moved, never found again.

Both layouts pack codes ``u = q + 2**(bits - 1)`` into 32-bit words, the first code in the least significant bits. At
2, 4 and 8 bits that is what ``quant.pack`` does; at 3 bits a code may straddle two words, 32 codes to three of them.
compressed-tensors packs along the input of a matrix [out, in]; GPTQ stores the transpose, still packed along the input,
and its zero points packed along the output.
"""

import torch
from torch import Tensor

from quant.exceptions import QuantError, ShapeError
from quant.grid import bounds
from quant.pack import pack, unpack
from quant.storage import GPTQ_MULTIPLE, WORD_BITS


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


def half_steps(words: Tensor, scale: Tensor, bits: int, group_size: int) -> tuple[Tensor, float]:
    """Steps in fp16, and the largest relative change of one that any code other than 0 is multiplied with.

    Args:
        words: int32 [out, packed_columns(in, bits)]. scale: [out, in // group_size].

    Raises:
        QuantError: such a step would be 0, or any would be infinite.
    """
    half = scale.half()
    codes = unpack(words, bits, scale.shape[1] * group_size).view(*scale.shape, group_size)
    used = (codes != -bounds(bits)[0]).any(dim=-1)
    lost = half.isinf() | (used & (half == 0))
    if bool(lost.any()):
        raise QuantError(f"float16 has no step for {float(scale[lost][0]):g}")
    change = ((half.to(scale.dtype) - scale).abs() / scale)[used]
    return half, float(change.max()) if change.numel() else 0.0

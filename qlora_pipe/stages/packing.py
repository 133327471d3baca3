"""Between configuration and numerics: formats, orientations and the buffers of packed linear maps."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from prune.groups import PRUNED_AXIS
from qlora_pipe.config import Decompose
from quant.blockwise import BlockFormat, BlockQuantized
from quant.linear import PackedLinear
from quant.pack import pack
from quant.storage import Choice, PackedShape


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configuration's name."""
    return getattr(torch, name)


def block_format(choice: Choice, settings: Decompose) -> BlockFormat:
    """NormalFloat blocks with one second-level group per row, so that slicing rows keeps every scale."""
    return BlockFormat(
        choice.bits,
        choice.block_size,
        scale_bits=settings.scale_bits,
        scale_dtype=torch_dtype(settings.scale_dtype),
    )


def stored(weight: Tensor, role: str) -> Tensor:
    """The orientation a matrix is stored in: what pruning cuts are rows."""
    return weight.T.contiguous() if PRUNED_AXIS[role] == "columns" else weight


def packed_buffers(
    quantized: BlockQuantized, left: Tensor, right: Tensor, shape: PackedShape, bias: Tensor | None
) -> dict[str, Tensor]:
    """Tensors of one packed linear map, from a decomposition of the stored orientation."""
    out_side, in_side = (right.T, left.T) if shape.transposed else (left, right)
    scale_codes = quantized.scale_codes
    found = {
        "codes": pack(quantized.codes, shape.choice.bits),
        "scale_codes": scale_codes if shape.scale_bits == 8 else pack(scale_codes, shape.scale_bits),
        "scale_max": quantized.scale_max,
        "scale_offset": quantized.scale_offset,
        "lowrank_left": out_side.to(torch_dtype(shape.factor_dtype)),
        "lowrank_right": in_side.to(torch_dtype(shape.factor_dtype)),
    }
    if bias is not None:
        found["bias"] = bias
    return found


def packed_linear(shape: PackedShape, buffers: Mapping[str, Tensor]) -> PackedLinear:
    """A PackedLinear that owns `buffers`."""
    module = PackedLinear(
        in_features=shape.in_features,
        out_features=shape.out_features,
        fmt=BlockFormat(
            shape.choice.bits,
            shape.choice.block_size,
            scale_bits=shape.scale_bits,
            scale_dtype=torch_dtype(shape.scale_dtype),
        ),
        rank=shape.choice.rank,
        transposed=shape.transposed,
        bias=shape.bias,
        factor_dtype=torch_dtype(shape.factor_dtype),
        device=torch.device("meta"),
    )
    module.load_state_dict(dict(buffers), assign=True)
    return module


def read_factors(read: Callable[[str], Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Stored LoRA factors of one linear map: A [rank, in] and B [out, rank]."""
    return read(f"{name}.lora_A.weight"), read(f"{name}.lora_B.weight")


def read_packed(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> PackedLinear:
    """A PackedLinear from the tensors on disk."""
    return packed_linear(shape, {buffer: read(f"{name}.{buffer}") for buffer in shape.buffers()})

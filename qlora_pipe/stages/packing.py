"""Between artifacts and numerics: packed linear maps from the tensors on disk."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant.linear import PackedLinear
from quant.storage import PackedShape


def packed_linear(shape: PackedShape, buffers: Mapping[str, Tensor]) -> PackedLinear:
    """A PackedLinear that owns `buffers`."""
    module = PackedLinear(shape, device=torch.device("meta"))
    module.load_state_dict(dict(buffers), assign=True)
    return module


def read_factors(read: Callable[[str], Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Stored LoRA factors of one linear map: A [rank, in] and B [out, rank]."""
    return read(f"{name}.lora_A.weight"), read(f"{name}.lora_B.weight")


def read_buffers(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> dict[str, Tensor]:
    """The tensors of one packed linear map."""
    return {buffer: read(f"{name}.{buffer}") for buffer in shape.buffers()}


def read_packed(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> PackedLinear:
    """A PackedLinear from the tensors on disk."""
    return packed_linear(shape, read_buffers(read, name, shape))

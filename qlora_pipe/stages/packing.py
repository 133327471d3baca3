"""Between artifacts and numerics: packed linear maps from the tensors on disk."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from qlora_pipe.exporters.packed import write_packed_settings
from qlora_pipe.packed_config import Packing
from qlora_pipe.sources import read_config
from qlora_pipe.stages.base import Context
from quant.linear import PackedLinear
from quant.storage import PackedShape


def packed_linear(shape: PackedShape, buffers: Mapping[str, Tensor]) -> PackedLinear:
    """A PackedLinear that owns `buffers`."""
    module = PackedLinear(shape, device=torch.device("meta"))
    module.load_state_dict(dict(buffers), assign=True)
    return module


def write_packed_model(context: Context, maps: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """The full decomposed model as a Hugging Face folder: the buffers of every linear map, all other tensors as the
    checkpoint has them, configuration and tokenizer. Peak bytes: the largest tensor, and what `maps` holds."""
    known, packings = context.known, {}
    with context.writer(known.decomposed()) as writer:
        for name, buffers in maps:
            for buffer, tensor in buffers.items():
                writer.write(f"{name}.{buffer}", tensor)
        for name in known.architecture.others():
            writer.write(name, context.base_reader.read(name))
    for layer, role, name in known.architecture.linears():
        shape = known.packed_shape("decompose", layer, role)
        packings[name] = Packing(shape.choice, shape.transposed)
    write_packed_settings(context.out, packings, config=read_config(context.base), base=context.base)


def read_factors(read: Callable[[str], Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Stored LoRA factors of one linear map: A [rank, in] and B [out, rank]."""
    return read(f"{name}.lora_A.weight"), read(f"{name}.lora_B.weight")


def read_buffers(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> dict[str, Tensor]:
    """The tensors of one packed linear map."""
    return {buffer: read(f"{name}.{buffer}") for buffer in shape.buffers()}


def read_packed(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> PackedLinear:
    """A PackedLinear from the tensors on disk."""
    return packed_linear(shape, read_buffers(read, name, shape))

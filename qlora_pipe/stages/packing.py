"""Between artifacts and numerics: packed linear maps from the tensors on disk."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.artifacts.tensors import TensorWriter, torch_dtype_of
from qlora_pipe.errors import StageError
from qlora_pipe.exporters.packed import write_packed_settings
from qlora_pipe.hf.model import small_config
from qlora_pipe.hf.packed import packed_like
from qlora_pipe.packed_config import Packing, to_json
from qlora_pipe.sources import read_config
from qlora_pipe.stages.base import Context
from quant.embedding import quantize_rows
from quant.exceptions import QuantError
from quant.linear import PackedLinear, PackedMatrix
from quant.storage import PackedShape


def packed_linear(shape: PackedShape, buffers: Mapping[str, Tensor]) -> PackedLinear:
    """A PackedLinear that owns `buffers`."""
    module = PackedLinear(shape, device=torch.device("meta"))
    module.load_state_dict(dict(buffers), assign=True)
    return module


def write_packed_model(context: Context, maps: Iterable[tuple[str, Mapping[str, Tensor]]]) -> None:
    """The full decomposed model as a Hugging Face folder: the buffers of every linear map, embedding and head packed
    or, as all other tensors, as the checkpoint has them, configuration and tokenizer.

    Peak bytes: the largest tensor as the checkpoint has it and, if that is packed, its packed form; and what `maps`
    holds. Raises WeightError or StageError naming a table that cannot be packed."""
    known, tables = context.known, context.known.tables()
    with context.writer(known.decomposed()) as writer:
        for name, buffers in maps:
            for buffer, tensor in buffers.items():
                writer.write(f"{name}.{buffer}", tensor)
        for name, shape in tables.items():
            for buffer, tensor in _packed_table(context, f"{name}.weight", shape).items():
                writer.write(f"{name}.{buffer}", tensor)
        for name in known.architecture.others():
            if name.removesuffix(".weight") not in tables:
                writer.write(name, context.base_reader.read(name))
    packings = packings_of(context, "decompose")
    write_packed_settings(context.out, packings, config=read_config(context.base), base=context.base)


def packings_of(context: Context, stage: str) -> dict[str, Packing]:
    """How decompose, refine or prune stores tables and linear maps, by module name."""
    known = context.known
    shapes = known.tables()
    for layer, role, name in known.architecture.linears():
        shapes[name] = known.packed_shape(stage, layer, role)
    return {name: Packing(shape.choice, shape.transposed) for name, shape in shapes.items()}


def small_settings(context: Context, packings: Mapping[str, Packing]) -> dict[str, Any]:
    """config.json of the small model, with a `quantization_config` for `packings` by module name, none if it is dense.

    It has the small widths if all layers have the same; else the original ones, which the sides of
    `quantization_config` correct map by map, as it adds the biases that pruning left."""
    small, config = context.known.small, read_config(context.base)
    found = dict(packings)
    if len(set(small.layers)) == 1:
        config = small_config(config, small)
    else:
        implied = context.known.architecture.linear_shapes()
        for name, sides in small.linear_shapes().items():
            if sides != implied[name]:
                found[name] = replace(found.get(name, Packing()), sides=sides)
    for _, role, name in small.linears():
        if role in small.biased - context.known.architecture.biased:
            found[name] = replace(found.get(name, Packing()), bias=True)
    return config | {"quantization_config": to_json(found)} if found else config


def _packed_table(context: Context, tensor: str, shape: PackedShape) -> dict[str, Tensor]:
    reader = context.base_reader
    stored = torch_dtype_of(reader.locations[tensor].spec.dtype)
    try:
        return quantize_rows(reader.read_float(tensor, stored), shape)
    except QuantError as error:
        raise StageError(f"{tensor}: {error}; set decompose.embeddings to keep") from error


def read_factors(read: Callable[[str], Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Stored LoRA factors of one linear map: A [rank, in] and B [out, rank]."""
    return read(f"{name}.lora_A.weight"), read(f"{name}.lora_B.weight")


def write_factors(writer: TensorWriter, name: str, lora_a: Tensor, lora_b: Tensor) -> None:
    """Store LoRA factors of one linear map, as `read_factors` finds them."""
    writer.write(f"{name}.lora_A.weight", lora_a)
    writer.write(f"{name}.lora_B.weight", lora_b)


def read_buffers(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> dict[str, Tensor]:
    """The tensors of one packed linear map."""
    return {buffer: read(f"{name}.{buffer}") for buffer in shape.buffers()}


def read_packed(read: Callable[[str], Tensor], name: str, shape: PackedShape) -> PackedLinear:
    """A PackedLinear from the tensors on disk."""
    return packed_linear(shape, read_buffers(read, name, shape))


def read_table(
    read: Callable[[str], Tensor], name: str, shape: PackedShape, dtype: torch.dtype, place: nn.Module
) -> PackedMatrix:
    """What takes the place of embedding or head `place`, from the tensors on disk; see `packed_like`."""
    module = packed_like(place, shape, dtype)
    module.load_state_dict(read_buffers(read, name, shape), assign=True)
    return module

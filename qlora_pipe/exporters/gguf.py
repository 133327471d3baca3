"""The integer model as a GGUF file, which llama.cpp runs and transformers dequantises."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from qlora_pipe.architectures import Architecture, place_of
from qlora_pipe.artifacts.layout import DTYPE_BYTES, Layout
from qlora_pipe.config_training import Compact
from qlora_pipe.errors import WeightError
from qlora_pipe.exporters.dense import converted
from qlora_pipe.gguf_layout import FILE, block_kind, gguf_name
from qlora_pipe.gguf_tokens import INSTEAD, Keys
from quant.exceptions import QuantError
from quant.grid import offset_of
from quant.interchange import gguf_blocks, half_smallest, half_steps, rotary_rows

_KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
_KINDS |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}


def write_gguf(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    keys: Keys,
    architecture: Architecture,
    bits: Mapping[str, int],
    settings: Compact,
) -> dict[str, float]:
    """`FILE` with codes as `read` gives them, steps and the smallest weights of groups in fp16, all else as `layout`
    says; the largest relative change of a step is returned, and of a smallest weight, in steps, where there are some.

    `layout` and `keys` are those of `gguf_layout`, `bits` the code width of every linear map. Raises WeightError if
    fp16 has no such number. Peak bytes: 9 for each weight of a map, or one other tensor in fp32.
    """
    writer = GGUFWriter(None, str(keys["general.architecture"]))
    for key, value in keys.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, _KINDS[type(value)])
    for name in architecture.tensors():
        spec, module = layout[gguf_name(name)], name.rpartition(".")[0]
        kind = block_kind(bits[module], settings) if spec.dtype == "U8" else spec.dtype
        octets = (*spec.shape[:-1], spec.shape[-1] * DTYPE_BYTES[spec.dtype])
        writer.add_tensor_info(
            gguf_name(name), octets, np.dtype(np.uint8), spec.nbytes, raw_dtype=GGMLQuantizationType[kind]
        )
    changes: dict[str, float] = {}
    try:
        writer.write_header_to_file(folder / FILE)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in architecture.tensors():
            spec, module = layout[gguf_name(name)], name.rpartition(".")[0]
            if spec.dtype == "U8":
                tensor, found = linear_blocks(read, module, architecture, bits[module], settings)
                changes = {each: max(changes.get(each, 0.0), change) for each, change in found.items()}
            else:
                tensor = converted(read, name, spec)
            writer.write_tensor_data(tensor.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()
    return changes


def linear_blocks(
    read: Callable[[str], Tensor], name: str, architecture: Architecture, bits: int, settings: Compact
) -> tuple[Tensor, dict[str, float]]:
    """The bytes of a linear map [out, bytes], its rows as readers of its family want them, and what fp16 changed."""
    codes, scale, group = read(f"{name}.codes"), read(f"{name}.scale"), settings.group_size
    kind = settings.offset_at(bits)
    smallest = None
    try:
        steps, change = half_steps(codes, scale, bits, group, unsigned=kind != "zero")
        changes = {"largest_change_of_a_step": change}
        offset = offset_of(kind, scale, read(f"{name}.offset") if kind == "trained" else None)
        if offset is not None:
            smallest, changes["largest_change_of_an_offset"] = half_smallest(scale, offset)
    except QuantError as error:
        raise WeightError(f"{name}: {error}; {INSTEAD}") from error
    blocks = gguf_blocks(codes, steps, bits, group, smallest)
    layer, role = place_of(name)
    if architecture.model_type == "llama" and role in ("q", "k"):
        blocks = blocks[rotary_rows(len(blocks), architecture.layers[layer].head_dim)]
    return blocks, changes

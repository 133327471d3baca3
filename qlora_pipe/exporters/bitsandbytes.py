"""The full decomposed model as NF4 of bitsandbytes, which stock transformers loads, and its low-rank parts for PEFT."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.exporters.dense import converted, write_settings
from qlora_pipe.exporters.peft import write_peft
from qlora_pipe.layouts import BITSANDBYTES_STATE, bitsandbytes_state
from quant.buffers import first_level_scales
from quant.interchange import bitsandbytes_buffers, lora_factors
from quant.pack import unpack
from quant.storage import PackedShape

ADAPTER = "adapter"
"""The folder of the low-rank parts, inside that of the model."""

_DENSE = ["lm_head", "o_proj", "down_proj"]


def write_bitsandbytes(
    folder: Path,
    layout: Layout,
    adapter: Layout,
    read: Callable[[str], Tensor],
    dense: Callable[[str], Tensor],
    *,
    maps: Mapping[str, PackedShape],
    config: dict[str, Any],
    base: Path,
    dtype: str,
) -> None:
    """Codes of `maps` as `read` gives them, their scales in fp32, all else as `dense` gives it, in `dtype`, config.json
    and the tokenizer of `base`; in the folder `ADAPTER` the low-rank parts of `maps`, as `adapter` lays them out.

    `maps` are those of `layouts.bitsandbytes_maps`. Exact but for what `dtype` rounds and the last bit of a level.
    Raises WeightError for what overflows `dtype`. Peak bytes: 4 for each weight of a map, or one tensor in fp32.
    """
    with TensorWriter(folder, layout) as writer:
        for name, shape in maps.items():
            buffers = {each: read(f"{name}.{each}") for each in shape.buffers()}
            codes = unpack(buffers["codes"], shape.choice.bits, shape.columns)
            scale = first_level_scales(buffers, shape)
            for buffer, tensor in bitsandbytes_buffers(codes, scale, buffers["levels"]).items():
                writer.write(f"{name}.{buffer}", tensor)
            state = torch.tensor(list(bitsandbytes_state(shape, dtype)), dtype=torch.uint8)
            writer.write(f"{name}.weight.{BITSANDBYTES_STATE}", state)
        for name in writer.missing():
            writer.write(name, converted(dense, name, layout[name]))
    write_settings(folder, config | {"dtype": dtype, "quantization_config": quantization_config(dtype)}, base)
    if not adapter:
        return
    (folder / ADAPTER).mkdir()

    def factor(tensor: str) -> Tensor:
        name, _, kind = tensor.removesuffix(".weight").rpartition(".")
        lora_a, lora_b = lora_factors({each: read(f"{name}.{each}") for each in maps[name].buffers()})
        return lora_a if kind == "lora_A" else lora_b

    ranks = {name: shape.choice.rank for name, shape in maps.items() if shape.choice.rank}
    write_peft(folder / ADAPTER, adapter, factor, base="..", rank=ranks, strength=1.0, scale=1.0, by_name=True)


def quantization_config(dtype: str) -> dict[str, Any]:
    """What readers are told. Fields: transformers, `BitsAndBytesConfig`; the block size of a matrix lies with it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _DENSE,
    }

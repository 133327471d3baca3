"""The integer model as a compressed-tensors checkpoint (`pack-quantized`), which stock transformers loads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.exporters.dense import converted, write_settings
from quant.interchange import compressed_tensors_buffers

FORMAT = "pack-quantized"


def write_compressed_tensors(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    bits: Mapping[str, int],
    group_size: int,
    config: dict[str, Any],
    base: Path,
    dtype: str,
) -> None:
    """Codes and fp32 steps as `read` gives them, all else in `dtype`, config.json, and the tokenizer of `base`.

    Exact: what a reader multiplies are the codes and steps of training. `bits` is the code width of every linear map,
    `config` the model without a quantization_config. Peak bytes: 6 for each weight of a
    map, or one other tensor in fp32.
    """
    with TensorWriter(folder, layout) as writer:
        for name, width in bits.items():
            stored = compressed_tensors_buffers(read(f"{name}.codes"), read(f"{name}.scale"), width, group_size)
            for buffer, tensor in stored.items():
                writer.write(f"{name}.{buffer}", tensor)
        for name in writer.missing():
            writer.write(name, converted(read, name, layout[name]))
    settings = {"dtype": dtype, "quantization_config": quantization_config(bits, group_size)}
    write_settings(folder, config | settings, base)


def quantization_config(bits: Mapping[str, int], group_size: int) -> dict[str, Any]:
    """What readers are told: settings of each width, its maps by name; of a single width, all maps but the head.

    Fields: compressed-tensors, `QuantizationConfig` and `QuantizationScheme`.
    """
    widths = sorted(set(bits.values()))
    named = {width: [name for name, value in bits.items() if value == width] for width in widths}
    targets = named if len(widths) > 1 else {widths[0]: ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": targets[width], "weights": _weights(width, group_size)}
            for number, width in enumerate(widths)
        },
        "ignore": ["lm_head"],
    }


def _weights(width: int, group_size: int) -> dict[str, Any]:
    return {
        "num_bits": width,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }

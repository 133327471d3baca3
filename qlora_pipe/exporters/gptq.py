"""The integer model as a GPTQ checkpoint, of the first or the second version of that format."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_pipe import __version__
from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.errors import WeightError
from qlora_pipe.exporters.dense import OTHER_DTYPE, converted, write_settings
from quant.exceptions import QuantError
from quant.interchange import gptq_buffers, half_steps

_INSTEAD = "take compressed-tensors for export.integer"

ZERO_SHIFT = {"gptq": 1, "gptq_v2": 0}
"""What readers of a version add to the zero points that are stored."""


def write_gptq(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    version: str,
    bits: Mapping[str, int],
    group_size: int,
    config: dict[str, Any],
    base: Path,
    dtype: str,
) -> float:
    """Codes as `read` gives them, steps and biases in fp16, all else in `dtype`, config.json, quantize_config.json and
    the tokenizer of `base`; the largest relative change of a step is returned.

    `bits` is the code width of every linear map, `config` the model without a quantization_config. Raises WeightError
    if fp16 has no such step. Peak bytes: 6 for each weight of a map, or one other tensor
    in fp32.
    """
    largest = 0.0
    with TensorWriter(folder, layout) as writer:
        for name, width in bits.items():
            codes = read(f"{name}.codes")
            try:
                steps, change = half_steps(codes, read(f"{name}.scale"), width, group_size)
            except QuantError as error:
                raise WeightError(f"{name}: {error}; {_INSTEAD}") from error
            largest = max(largest, change)
            for buffer, tensor in gptq_buffers(codes, steps, width, group_size, ZERO_SHIFT[version]).items():
                writer.write(f"{name}.{buffer}", tensor)
        for name in writer.missing():
            # Biases are fp16 whatever export.dtype says.
            instead = _INSTEAD if name.endswith(".bias") else OTHER_DTYPE
            writer.write(name, converted(read, name, layout[name], instead))
    settings = quantization_config(version, bits, group_size)
    (folder / "quantize_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_settings(folder, config | {"dtype": dtype, "quantization_config": settings}, base)
    return largest


def quantization_config(version: str, bits: Mapping[str, int], group_size: int) -> dict[str, Any]:
    """What readers are told: the commonest width, and under `dynamic`, which GPTQModel reads, the maps of another.

    Fields: GPTQModel, `QuantizeConfig`.
    """
    common = Counter(bits.values()).most_common(1)[0][0]
    other = {f"+:^{re.escape(name)}$": {"bits": width} for name, width in bits.items() if width != common}
    found: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": version,
        "bits": common,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"qlora_pipe:{__version__}"]},
    }
    return found | ({"dynamic": other} if other else {})

"""A LoRA adapter in the folder format of PEFT, readable by PEFT alone."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.tensors import TensorWriter

STEM = "adapter_model"
_ROOT = "base_model.model."


def write_peft(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    base: str,
    rank: int,
    strength: float,
    scale: float,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    PEFT computes x + lora_alpha / r * B A x, so lora_alpha = strength * rank; the recovery `scale` is folded into B.
    Exact for scale 1. Peak bytes: one factor.
    """
    # PEFT reads one file, whatever its size.
    with TensorWriter(folder, layout, stem=STEM, limit=sys.maxsize) as writer:
        for name in layout:
            tensor = read(name.removeprefix(_ROOT))
            writer.write(name, tensor * scale if name.endswith("lora_B.weight") else tensor)
    targets = sorted({name.split(".")[-3] for name in layout})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": strength * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": targets,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

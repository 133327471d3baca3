"""A LoRA adapter in the folder format of PEFT, readable by PEFT alone."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.layouts import Rank

STEM = "adapter_model"
_ROOT = "base_model.model."


def write_peft(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    base: str,
    rank: Rank,
    strength: float,
    scale: float,
    by_name: bool = False,
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    PEFT computes x + lora_alpha / r * B A x, so lora_alpha = strength * rank; the recovery `scale` is folded into B.
    Maps whose rank is not the most common one are in the patterns; `by_name`: some maps have no adapter, so that those
    that have one are named one by one. Exact for scale 1. Peak bytes: one factor.
    """
    # PEFT reads one file, whatever its size.
    with TensorWriter(folder, layout, stem=STEM, limit=sys.maxsize) as writer:
        for name in layout:
            tensor = read(name.removeprefix(_ROOT))
            writer.write(name, tensor * scale if name.endswith("lora_B.weight") else tensor)
    targets = sorted(
        {name.removeprefix(_ROOT).rsplit(".", 2)[0] if by_name else name.split(".")[-3] for name in layout}
    )
    ranks = {} if isinstance(rank, int) else rank
    common = rank if isinstance(rank, int) else Counter(rank.values()).most_common(1)[0][0]
    others = {name: size for name, size in ranks.items() if size != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": strength * common,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": targets,
    }
    if others:
        config["rank_pattern"] = others
        config["alpha_pattern"] = {name: strength * size for name, size in others.items()}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

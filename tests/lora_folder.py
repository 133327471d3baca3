"""LoRA folders of random factors, as PEFT saves them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def random_pair(out: int, columns: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Pair:
    """A [rank, columns] and B [out, rank] whose directions differ in size."""
    generator = torch.Generator().manual_seed(seed)
    lora_a = torch.randn(rank, columns, generator=generator) / columns**0.5
    lora_b = torch.randn(out, rank, generator=generator) * 0.5 ** torch.arange(rank)
    return lora_a.to(dtype), lora_b.to(dtype)


def save_lora(folder: Path, pairs: Mapping[str, Pair], **changes: Any) -> Path:
    """`pairs` by module name, with the rank of the first as `r`."""
    folder.mkdir(parents=True)
    tensors = {}
    for name, pair in pairs.items():
        for side, tensor in zip("AB", pair, strict=True):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = tensor.clone().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = {name: len(lora_a) for name, (lora_a, _) in pairs.items()}
    common = next(iter(ranks.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/model",
        "r": common,
        "lora_alpha": 2 * common,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder

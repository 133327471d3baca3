"""What makes a folder of packed tensors one that `AutoModelForCausalLM.from_pretrained` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pipe.exporters.dense import write_settings
from qlora_pipe.packed_config import Packing, to_json


def write_packed_settings(folder: Path, packings: Mapping[str, Packing], *, config: dict[str, Any], base: Path) -> None:
    """config.json with a `quantization_config`, and the tokenizer of `base`; the tensors are written elsewhere."""
    write_settings(folder, config | {"quantization_config": to_json(packings)}, base)

"""A plain Hugging Face folder, streamed tensor by tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.tensors import TensorWriter, torch_dtype_of
from qlora_pipe.errors import WeightError
from qlora_pipe.sources import is_tokenizer


def write_dense(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    config: dict[str, Any],
    base: Path,
    dtype: str,
) -> None:
    """Weights, config.json and the tokenizer of `base`; WeightError if a weight overflows `dtype`.

    Peak bytes: one tensor in fp32.
    """
    with TensorWriter(folder, layout) as writer:
        for name, spec in layout.items():
            tensor = read(name).to(torch_dtype_of(spec.dtype))
            if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
                raise WeightError(f"tensor {name} overflows {dtype}; set export.dtype to bfloat16 or float32")
            writer.write(name, tensor)
            del tensor  # before the next one is read
    write_settings(folder, config | {"dtype": dtype}, base)


def write_settings(folder: Path, config: dict[str, Any], base: Path) -> None:
    """config.json, and the tokenizer and generation defaults of `base`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in sorted(base.iterdir()):
        if is_tokenizer(path):
            shutil.copyfile(path, folder / path.name)

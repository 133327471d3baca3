"""A plain Hugging Face folder, streamed tensor by tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pipe.artifacts.layout import Layout, TensorSpec
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
            writer.write(name, converted(read, name, spec))
    write_settings(folder, config | {"dtype": dtype}, base)


OTHER_DTYPE = "set export.dtype to bfloat16 or float32"


def converted(read: Callable[[str], Tensor], name: str, spec: TensorSpec, instead: str = OTHER_DTYPE) -> Tensor:
    """A tensor in the dtype of `spec`; WeightError if it overflows that, which says what to do `instead`."""
    dtype = torch_dtype_of(spec.dtype)
    tensor = read(name).to(dtype)
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        kind = str(dtype).removeprefix("torch.")
        raise WeightError(f"tensor {name} overflows {kind}; {instead}")
    return tensor


def write_settings(folder: Path, config: dict[str, Any], base: Path) -> None:
    """config.json, and the tokenizer and generation defaults of `base`."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in sorted(base.iterdir()):
        if is_tokenizer(path):
            shutil.copyfile(path, folder / path.name)

"""Building transformers models whose linear maps we choose, layer by layer, from tensors on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_pipe.architectures import EMBEDDING, Architecture
from qlora_pipe.errors import DeviceError, SourceError
from qlora_pipe.hf.packed import tie_head
from qlora_pipe.hf.source import quiet
from qlora_pipe.meter import release_memory

Model = PreTrainedModel
"""The type of every model of the chain."""

LinearOf = Callable[[int, str, str], nn.Module]
"""(layer, role, module name) to the module that takes its place."""

InPlaceOf = Callable[[nn.Module], nn.Module]
"""The module that was there to the one that takes its place."""

M = TypeVar("M", bound=nn.Module)

TensorOf = Callable[[str], Tensor]
"""Tensor name to its value, for embeddings, norms and head."""


def build(
    config: dict[str, Any],
    architecture: Architecture,
    linear: LinearOf,
    other: TensorOf,
    *,
    device: str,
    packed: Mapping[str, InPlaceOf] | None = None,
) -> PreTrainedModel:
    """A frozen model in evaluation mode. Peak bytes: what `linear`, `other` and `packed` return, one at a time, kept.

    `packed`: embedding and head that are no dense tensors, by module name; a tied head is the embedding's.
    `architecture` may have other widths than `config`, and different ones in each layer: attention reads the number of
    heads off the tensors, and the ratio of query to key heads is the same everywhere.
    """
    model, packed = empty_model(config), packed or {}
    for layer, role, name in architecture.linears():
        put_module(model, name, linear(layer, role, name).to(device))
    for name, in_place_of in packed.items():
        put_module(model, name, in_place_of(model.get_submodule(name)).to(device))
    for name in architecture.others():
        if name.removesuffix(".weight") not in packed:
            put_tensor(model, name, other(name).to(device))
    if architecture.tied and EMBEDDING in packed:
        tie_head(model)
    elif architecture.tied:
        model.tie_weights()
    return finished(model, device)


def empty_model(config: dict[str, Any]) -> PreTrainedModel:
    """A model whose parameters have shapes but no memory; buffers are computed."""
    quiet()
    # The last model, full of reference cycles, must be gone before the next one is built.
    release_memory()
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter of that name, frozen."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def finished(module: M, device: str) -> M:
    """The module frozen, in evaluation mode and whole on `device`; raises SourceError naming a parameter not set."""
    left = [name for name, tensor in module.named_parameters() if tensor.is_meta]
    if left:
        raise SourceError(f"parameter {left[0]} of {type(module).__name__} is not in the architecture description")
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    return module.requires_grad_(False).eval()


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear that owns `weight` [out, in]; no copy."""
    with init_empty_weights():
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


class AdaptedLinear(nn.Module):
    """y = base(x) + strength * B A x, the function PEFT computes for a LoRA layer in evaluation mode."""

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, base: nn.Module, lora_a: Tensor, lora_b: Tensor, strength: float) -> None:
        super().__init__()
        self.base = base
        self.strength = strength
        self.register_buffer("lora_a", lora_a)
        self.register_buffer("lora_b", lora_b)

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = (x @ self.lora_a.T) @ self.lora_b.T
        result: Tensor = self.base(x)
        return result + self.strength * low


def set_strength(model: nn.Module, strength: float) -> None:
    """Set the adapter scale of every AdaptedLinear; 0 gives the base model."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.strength = strength


def small_config(config: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """config.json of a pruned model with equal widths in every layer, as stock transformers reads it."""
    widths = set(architecture.layers)
    if len(widths) != 1:
        raise SourceError("stock transformers needs equal widths in every layer, but the pruned layers differ")
    shape = widths.pop()
    return config | {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
    }


def check_device(device: str) -> torch.device:
    """The torch device of that name; raises DeviceError if this machine has none or it is not the first of its kind."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(
            f"device {device!r}: expected a device of this machine, found {str(error).splitlines()[0]}; "
            "set device to cpu, or install the torch build for your accelerator"
        ) from error
    if found.index:
        raise DeviceError(
            f"device {device!r}: training uses the first device it sees; set device to {found.type} and choose it "
            "with CUDA_VISIBLE_DEVICES"
        )
    return found


def load_config(folder: Path) -> dict[str, Any]:
    """config.json with every default of the transformers class filled in."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()

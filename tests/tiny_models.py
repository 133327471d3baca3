"""Tiny models in memory, through the same doors as the stages: dense, packed and L4Q linear maps."""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer
from torch import Tensor, nn

from prune.groups import PRUNED_AXIS
from qlora_pipe.architectures import Architecture, from_config
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.model import Model, build, dense_linear, load_config
from qlora_pipe.hf.sequences import IGNORED, Row
from qlora_pipe.layouts import packed_shape
from qlora_pipe.stages.packing import packed_linear
from quant.buffers import packed_buffers
from quant.decompose import decompose
from quant.fakequant import L4QLinear
from quant.linear import PackedLinear
from quant.storage import Choice

CHOICE = Choice("nf", 4, 16, 4)


class TinyFolder:
    """A model folder as the stages see it."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = load_config(folder)
        self.architecture: Architecture = from_config(self.config)
        self.reader = TensorReader(folder)

    def weight(self, role: str, name: str) -> tuple[Tensor, Tensor | None]:
        bias = self.reader.read_float(f"{name}.bias") if role in self.architecture.biased else None
        return self.reader.read_float(f"{name}.weight"), bias

    def build(
        self, linear: Callable[[int, str, str], nn.Module], architecture: Architecture | None = None, **packed: Any
    ) -> Model:
        architecture = architecture or self.architecture
        return build(self.config, architecture, linear, self.reader.read_float, device="cpu", **packed)

    def dense(self) -> Model:
        return self.build(lambda layer, role, name: dense_linear(*self.weight(role, name)))

    def stream(self) -> LayerStream:
        """The same, a layer at a time."""
        return LayerStream(
            self.config,
            self.architecture,
            lambda layer, role, name: dense_linear(*self.weight(role, name)),
            self.reader.read_float,
            device="cpu",
        )

    def packed(self, rank: int = 4) -> Model:
        """Q + L1 L2 with an adapter to train on every linear map."""
        generator = torch.Generator().manual_seed(0)

        def linear(layer: int, role: str, name: str) -> nn.Module:
            weight, bias = self.weight(role, name)
            result = decompose(
                weight,
                CHOICE,
                generator=torch.Generator().manual_seed(0),
                transposed=PRUNED_AXIS[role] == "columns",
                max_iterations=1,
            )
            shape = packed_shape(self.architecture, layer, role, CHOICE)
            return packed_linear(
                shape, packed_buffers(result.quantized, (result.left, result.right, None), shape, bias)
            )

        model = self.build(linear)
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.attach_adapter(rank, 2.0 * rank, generator)
        return model

    def l4q(self, bits: int = 4) -> Model:
        """L4Q linear maps whose factors and steps are trained."""
        generator = torch.Generator().manual_seed(0)

        def linear(layer: int, role: str, name: str) -> nn.Module:
            weight, bias = self.weight(role, name)
            return L4QLinear(weight, bias, bits=bits, group_size=32, rank=4, alpha=2.0, generator=generator)

        model = self.build(linear)
        for module in model.modules():
            if isinstance(module, L4QLinear):
                for parameter in (module.lora_a, module.lora_b, module.scale):
                    parameter.requires_grad_()
        return model


class LiveWeights:
    """Which decoder layers of a tiny model hold weights now, and at most at any load; and how often each was loaded."""

    def __init__(self, tiny: TinyFolder) -> None:
        self.tiny, self.most, self.loads = tiny, 0, Counter[int]()
        self._alive: list[tuple[int, weakref.ref[Tensor]]] = []
        names = [name for name in tiny.architecture.tensors() if name.startswith("model.layers.0.")]
        self.layer_size = sum(math.prod(tiny.architecture.tensors()[name]) for name in names)

    def stream(self) -> LayerStream:
        """A stream whose every load is counted."""
        return LayerStream(
            self.tiny.config, self.tiny.architecture, self._linear, self.tiny.reader.read_float, device="cpu"
        )

    def now(self) -> set[int]:
        return {layer for layer, weight in self._alive if weight() is not None}

    def _linear(self, layer: int, role: str, name: str) -> nn.Module:
        weight, bias = self.tiny.weight(role, name)
        module = dense_linear(weight, bias)
        self._alive.append((layer, weakref.ref(module.weight)))
        self.most = max(self.most, len(self.now()))
        self.loads[layer] += role == "q"
        return module


def byte_rows(texts: list[str], ignored: int = 0) -> list[Row]:
    """One row a text; the first `ignored` tokens of each are not scored."""
    tokenizer = byte_tokenizer()
    found = []
    for text in texts:
        ids = tuple(tokenizer(text).input_ids)
        found.append(Row(ids, (IGNORED,) * ignored + ids[ignored:]))
    return found

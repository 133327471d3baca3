"""Integer models without a training: random codes and steps at the shapes of a tiny model."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import TinyFolder
from torch import Tensor

from qlora_pipe import layouts
from qlora_pipe.config_training import Compact
from qlora_pipe.exporters.compressed_tensors import write_compressed_tensors
from qlora_pipe.exporters.gguf import write_gguf
from qlora_pipe.exporters.gptq import write_gptq
from qlora_pipe.gguf_layout import gguf_keys, gguf_tensors
from qlora_pipe.hf.model import Model, dense_linear
from quant.pack import pack


class Integers:
    """What the compact stage would store: codes of 4 bits or what `bits` says of a role, and steps for 32 weights."""

    def __init__(self, base: Path, bits: dict[str, int]) -> None:
        self.tiny, self.base, self.settings = TinyFolder(base), base, Compact(group_size=32)
        self.codes: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.bits = {name: bits.get(role, 4) for _, role, name in self.tiny.architecture.linears()}
        generator = torch.Generator().manual_seed(0)
        for name, (rows, columns) in self.tiny.architecture.linear_shapes().items():
            width = self.bits[name]
            self.codes[name] = torch.randint(2**width, (rows, columns), generator=generator, dtype=torch.uint8)
            self.tensors[f"{name}.codes"] = pack(self.codes[name], width)
            self.tensors[f"{name}.scale"] = (torch.rand(rows, columns // 32, generator=generator) + 0.1) / 2**width

    def read(self, tensor: str) -> Tensor:
        return self.tensors[tensor] if tensor in self.tensors else self.tiny.reader.read_float(tensor)

    def write(self, folder: Path, kind: str, dtype: str) -> float | None:
        shared: dict[str, Any] = {
            "bits": self.bits,
            "group_size": 32,
            "config": self.tiny.config,
            "base": self.base,
            "dtype": dtype,
        }
        given = (self.tiny.architecture, dtype, self.settings, self.bits)
        if kind == "compressed-tensors":
            return write_compressed_tensors(folder, layouts.compressed_tensors(*given), self.read, **shared)
        if kind == "gguf":
            keys = gguf_keys(self.base, self.tiny.architecture, self.settings, self.bits)
            about: dict[str, Any] = {"architecture": self.tiny.architecture, "settings": self.settings}
            found = write_gguf(folder, gguf_tensors(*given), self.read, keys=keys, bits=self.bits, **about)
            return found["largest_change_of_a_step"]
        return write_gptq(folder, layouts.gptq(*given), self.read, version=kind, **shared)

    def weight(self, name: str, steps: torch.dtype = torch.float32) -> Tensor:
        """fp32 weight [out, in] of a map, its steps rounded to `steps`."""
        signed = self.codes[name].float() - 2 ** (self.bits[name] - 1)
        return signed * self.tensors[f"{name}.scale"].to(steps).float().repeat_interleave(32, dim=1)

    def model(self, steps: torch.dtype = torch.float32) -> Model:
        """The model whose weights these are."""
        return self.tiny.build(
            lambda layer, role, name: dense_linear(self.weight(name, steps), self.tiny.weight(role, name)[1])
        )

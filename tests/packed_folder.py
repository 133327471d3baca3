"""A tiny packed folder without the chain: several formats, as decompose writes them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_models import TinyFolder

from qlora_pipe import layouts
from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.exporters.packed import write_packed_settings
from qlora_pipe.hf.model import Model
from qlora_pipe.packed_config import Packing
from qlora_pipe.stages.packing import read_packed, read_table
from quant.buffers import packed_buffers
from quant.decompose import decompose
from quant.embedding import quantize_rows
from quant.storage import Choice

CHOICES = {
    "q": Choice("nf", 3, 16, 4),
    "gate": Choice("uint", 4, 32, 0, scale_bits=16, scale_dtype="float16"),
    "down": Choice("int", 4, 32, 2, scale_bits=32, scale_dtype="float32", factor_dtype="int8"),
}
"""By role; the others have this one."""
REST = Choice("nf", 4, 16, 4)


def choice_of(role: str) -> Choice:
    return CHOICES.get(role, REST)


def save_packed(base: Path, folder: Path, embeddings: str = "keep") -> Path:
    """The model of `base`, packed into `folder`."""
    tiny = TinyFolder(base)
    folder.mkdir()
    allocation = {name: choice_of(role) for _, role, name in tiny.architecture.linears()}
    dtypes = {name: place.spec.dtype for name, place in tiny.reader.locations.items()}
    tables = layouts.tables(tiny.architecture, embeddings)
    packings = {name: Packing(shape.choice, shape.transposed) for name, shape in tables.items()}
    with TensorWriter(folder, layouts.decomposed(tiny.architecture, dtypes, allocation, embeddings)) as writer:
        for layer, role, name in tiny.architecture.linears():
            choice = choice_of(role)
            shape = layouts.packed_shape(tiny.architecture, layer, role, choice)
            weight, bias = tiny.weight(role, name)
            generator = torch.Generator().manual_seed(0)
            result = decompose(weight, choice, generator=generator, transposed=shape.transposed, max_iterations=1)
            factors = (result.left, result.right, result.factor_scale)
            for buffer, tensor in packed_buffers(result.quantized, factors, shape, bias).items():
                writer.write(f"{name}.{buffer}", tensor)
            packings[name] = Packing(choice, shape.transposed)
        for name, shape in tables.items():
            for buffer, tensor in quantize_rows(tiny.reader.read(f"{name}.weight"), shape).items():
                writer.write(f"{name}.{buffer}", tensor)
        for name in tiny.architecture.others():
            if name.removesuffix(".weight") not in tables:
                writer.write(name, tiny.reader.read(name))
    config = json.loads((base / "config.json").read_text())
    write_packed_settings(folder, packings, config=config, base=base)
    return folder


def packed_model(base: Path, reader: Any, embeddings: str = "keep") -> Model:
    """The same in fp32, through the doors of the stages; `reader` reads the packed folder."""
    tiny = TinyFolder(base)

    def linear(layer: int, role: str, name: str) -> Any:
        return read_packed(reader.read, name, layouts.packed_shape(tiny.architecture, layer, role, choice_of(role)))

    tables = layouts.tables(tiny.architecture, embeddings).items()
    packed = {name: partial(read_table, reader.read, name, shape, torch.float32) for name, shape in tables}
    return tiny.build(linear, packed=packed)

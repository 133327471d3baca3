"""What a stage is, and what it is given."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from prune.indexmap import IndexMap
from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader, TensorWriter
from qlora_pipe.config import Config
from qlora_pipe.config_data import Dataset
from qlora_pipe.events import Reporter
from qlora_pipe.known import Known
from qlora_pipe.selection import read_index_map


@dataclass(frozen=True)
class Context:
    """All a stage may see: its configuration, what it reads, and where it writes."""

    config: Config
    known: Known
    base: Path
    inputs: Mapping[str, Artifact]
    out: Path
    work: Path
    reporter: Reporter

    def reader(self, stage: str, stem: str = "model") -> TensorReader:
        """The tensors an input stage wrote."""
        return TensorReader(self.inputs[stage].folder, stem)

    @cached_property
    def base_reader(self) -> TensorReader:
        """The tensors of the original model."""
        return TensorReader(self.base)

    def writer(self, layout: Layout, stem: str = "model", folder: str = ".") -> TensorWriter:
        """A writer for exactly `layout`, in this stage's artifact."""
        place = self.out / folder
        place.mkdir(parents=True, exist_ok=True)
        return TensorWriter(place, layout, stem=stem)

    def read_json(self, stage: str, name: str) -> Any:
        """A JSON document an input stage wrote."""
        return json.loads((self.inputs[stage].folder / name).read_text())

    def write_json(self, name: str, body: Any) -> None:
        """A JSON document of this stage's artifact, readable and the same on every run."""
        (self.out / name).write_text(json.dumps(body, indent=2, allow_nan=False) + "\n")

    @cached_property
    def index_map(self) -> IndexMap:
        """Which groups stay; raises ArtifactError if that was selected for another model."""
        source = self.inputs["source"].manifest
        return read_index_map(self.inputs["select"].folder, source, self.known.architecture.layers)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return getattr(torch, self.config.dtype)


@dataclass(frozen=True)
class Stage:
    """One link of the chain. Its artifact's identity follows from settings, inputs, data and code_version."""

    name: str
    code_version: int
    inputs: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    run: Callable[[Context], None]
    data: Callable[[Config], dict[str, Dataset]] = lambda config: {}
    work: Callable[[Context], None] | None = None
    """What other processes do while rank 0 is in `run`, for a stage that they share; see qlora_pipe.hf.ranks."""


def alike(run: Callable[[Context], None]) -> Callable[[Context], None]:
    """A `Stage.work` for training: all that rank 0 does, and what it writes is thrown away."""

    def work(context: Context) -> None:
        with TemporaryDirectory(dir=context.work) as out:
            run(replace(context, out=Path(out)))

    return work


def computing(config: Config) -> dict[str, Any]:
    """The settings that every stage which runs the model depends on."""
    return {"seed": config.seed, "device": config.device, "dtype": config.dtype}

"""Whether an exported folder means to the libraries that others load it with what it means here."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config_data import TASK
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.exporters.gptq import ZERO_SHIFT
from qlora_pipe.gguf_layout import FILE, gguf_bytes
from qlora_pipe.hf import consumer
from qlora_pipe.hf.model import Model
from qlora_pipe.known import CHAIN
from qlora_pipe.plan import know
from qlora_pipe.report.facts import read_json
from qlora_pipe.report.table import render
from qlora_pipe.sources import BASE_LINK
from qlora_pipe.stages import compact, export, recover
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.compact import compact_model
from qlora_pipe.stages.models import base_model, decomposed_model, task_model, with_adapter
from qlora_pipe.stages.train import strength
from qlora_pipe.verify_integers import difference, gguf_difference, gguf_stored

TOKENS = 64
"""Held-out tokens whose logits are compared, at most."""

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}
"""Largest norm of the difference of logits, relative to their own, by the coarsest dtype on the way."""

_READERS = {"peft": "peft", "compressed-tensors": "compressed-tensors", "gguf": "gguf", "bitsandbytes": "bitsandbytes"}
_READERS |= dict.fromkeys(ZERO_SHIFT, "gptqmodel")
_PACKAGES = {"compressed-tensors": ("compressed_tensors",), "gptqmodel": ("gptqmodel", "optimum")}


@dataclass(frozen=True)
class Verdict:
    """What was found of one folder; `difference` and `tolerance` are None where only the layout was checked."""

    folder: str
    reader: str
    difference: float | None
    tolerance: float | None
    holds: bool
    note: str


def show_consumers(run: Path, file: Path | None = None) -> tuple[str, bool]:
    """A table of all exported folders of a run, and whether all hold; the same as JSON into `file`.

    Raises ArtifactError if the run is not whole, ConfigError if the file cannot be written."""
    found = list(check_consumers(run))
    if file is not None:
        try:
            file.write_text(json.dumps([asdict(row) for row in found], indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{file}: expected a path that can be written, found {error.strerror}") from error
    head = ("folder", "read by", "verdict", "difference of logits", "tolerance")
    rows = [(row.folder, row.reader, row.note, _figure(row.difference), _figure(row.tolerance)) for row in found]
    return render(head, rows, text_columns=3), all(row.holds for row in found)


def check_consumers(run: Path) -> Iterator[Verdict]:
    """Compare every exported folder with the pipeline's own model on held-out tokens, in fp32 on the CPU.

    Peak bytes: as evaluate, in this process and in the reader's, one after the other. Writes nothing into the run.
    """
    context, dtype = open_run(run)
    check = Check(context, run, dtype)
    for name, said in (read_json(run / "export" / "export.json") or {}).items():
        if "left_out" not in said:
            yield check.verdict(name)


def open_run(run: Path) -> tuple[Context, str]:
    """What a stage behind the last one would see of a finished run, on the CPU in fp32, and the dtype that the run
    computed in; raises ArtifactError."""
    artifacts = {name: Artifact((run / name).resolve(), read_manifest(run / name)) for name in CHAIN}
    for name in artifacts["export"].manifest.inputs:
        if name in CHAIN and artifacts["export"].manifest.inputs[name] != artifacts[name].identity:
            raise ArtifactError(f"{run / 'export'}: it was made from another {name}; run the chain again")
    written = load(run / "config.yaml")
    for stage in (compact.STAGE, recover.STAGE, export.STAGE):
        made = artifacts[stage.name].manifest.settings
        # A run that is looked at from another folder calls its base by another path.
        wanted = {key: value for key, value in stage.settings(written).items() if key != "base_name"}
        changed = [key for key, value in wanted.items() if made.get(key) != value]
        if changed:
            raise ArtifactError(
                f"{run / stage.name}: it was made with other settings than config.yaml has ({', '.join(changed)}); run "
                "the chain again"
            )
    config = written.model_copy(update={"run": str(run), "device": "cpu", "dtype": "float32"})
    base = (run / BASE_LINK).resolve()
    context = Context(config, know(config, base), base, artifacts, run, run, Reporter(stream=sys.stderr))
    allocation = read_allocation(context.read_json("allocate", "allocation.json"))
    known = context.known.with_allocation(allocation).with_kept(context.index_map.kept_shapes)
    return replace(context, known=known), written.dtype


@dataclass
class Check:
    """One run, the dtype it computed in, and the logits of its models as they are asked for."""

    context: Context
    run: Path
    dtype: str

    def verdict(self, name: str) -> Verdict:
        """What is to be said of the folder `name`."""
        reader = _READERS.get(name, "transformers")
        ours = "quantization_config" in _settings(self.run / "export" / name) if name == "small" else False
        if name in ("compressed-tensors", "gguf", *ZERO_SHIFT):
            problem = self._gguf_problem() if name == "gguf" else self._layout_problem(name)
            if problem is not None:
                return Verdict(name, reader, None, None, False, problem)
        if any(find_spec(package) is None for package in _PACKAGES.get(reader, ())):
            return Verdict(name, reader, None, None, True, "layout only")
        read = self._read(name, reader, ours)
        shown = "transformers, qlora_pipe" if ours else reader
        if isinstance(read, str):
            return Verdict(name, shown, None, None, False, read)
        own = self._own(name)
        difference = float((read - own).norm() / own.norm())
        tolerance = TOLERANCE["bfloat16" if reader == "gptqmodel" else self._dtype(name)]
        holds = difference <= tolerance
        return Verdict(name, shown, difference, tolerance, holds, "the same" if holds else "DIFFERS")

    @cached_property
    def ids(self) -> list[int]:
        """The first held-out tokens of the task."""
        rows = (self.run / "evaluate" / "heldout" / f"{TASK}.jsonl").read_text().splitlines()
        return [token for row in rows for token in json.loads(row)["input_ids"]][:TOKENS]

    @cached_property
    def integer_logits(self) -> Tensor:
        """Of the integer model, and what stays beside it."""
        return self._logits(compact_model(self.context))

    @cached_property
    def recovered_logits(self) -> Tensor:
        """Of the original model with the recovered adapter."""
        return self._logits(self._recovered("original"))

    def _dtype(self, name: str) -> str:
        """The coarsest on the way; original weights are merged in that of the run."""
        config = self.context.config
        merged = name == "small" and config.train.base == "original" and not config.compact.enabled
        steps = ["float16"] if name == "gguf" else []
        dtypes = () if name == "peft" else (config.export.dtype, *steps, *([self.dtype] if merged else []))
        return max(dtypes, key=lambda dtype: TOLERANCE[dtype], default="float32")

    def _own(self, name: str) -> Tensor:
        """Logits [tokens, vocabulary] of the pipeline's own model."""
        context = self.context
        deployed = context.config.recover.base
        if name == "peft" or (name == "merged" and deployed == "original"):
            return self.recovered_logits
        if name == "bitsandbytes":
            return self._logits(decomposed_model(context))
        if name == "merged":
            return self._logits(self._recovered(deployed))
        if context.config.compact.enabled:
            return self.integer_logits
        trained = with_adapter(context.reader("train", "adapter").read, strength(context), context.dtype)
        return self._logits(task_model(context, trained))

    def _recovered(self, base: str) -> Model:
        factor = self.context.read_json("recover", "recovery.json")["scale"] * strength(self.context)
        adapted = with_adapter(self.context.reader("recover", "adapter").read, factor, self.context.dtype)
        return (base_model if base == "original" else decomposed_model)(self.context, adapted)

    def _logits(self, model: Model) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=torch.tensor([self.ids])).logits[0].float()
        return found

    def _read(self, name: str, reader: str, ours: bool) -> Tensor | str:
        """The reader's logits, or the last line of what it had to say."""
        with TemporaryDirectory() as place:
            request: dict[str, Any] = {
                "reader": reader,
                "folder": str((self.run / "export" / name).resolve()),
                "base": str(self.context.base),
                "ids": self.ids,
                "ours": str(Path(__file__).parents[1]) if ours else None,
                "out": str(Path(place) / "logits.safetensors"),
            }
            (Path(place) / "request.json").write_text(json.dumps(request))
            # GPTQModel wants two workers at least, and gives itself one on two cores.
            quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
            command = [sys.executable, "-I", str(consumer.__file__), str(Path(place) / "request.json")]
            done = subprocess.run(command, capture_output=True, text=True, env=quiet | os.environ, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                return f"CANNOT BE LOADED: {lines[-1]}"
            return load_file(request["out"])["logits"]

    def _layout_problem(self, name: str) -> str | None:
        """What in an integer folder is not as the format wants it, or not what was trained; None if nothing."""
        known, compact = self.context.known, self.context.reader("compact")
        reader = TensorReader(self.run / "export" / name)
        expected = known.exported_integers("compressed-tensors" if name == "compressed-tensors" else "gptq")
        if {tensor: place.spec for tensor, place in reader.locations.items()} != expected:
            return "DIFFERS: other tensors than the format has"
        for linear, sides in known.small.linear_shapes().items():
            problem = difference(reader, compact, name, linear, sides, known.integer_bits[linear])
            if problem is not None:
                return f"DIFFERS: {problem}"
        return None

    def _gguf_problem(self) -> str | None:
        """The same of the GGUF file: every block as it is made from what was trained, and the planned size."""
        known, path = self.context.known, self.run / "export" / "gguf" / FILE
        layout, compact = known.exported_integers("gguf"), self.context.reader("compact")
        if path.stat().st_size != gguf_bytes(layout, known.gguf_keys):
            return "DIFFERS: another size than the format has"
        stored = gguf_stored(path)
        if set(stored) != set(layout):
            return "DIFFERS: other tensors than the format has"
        problem = gguf_difference(stored, compact, known.small, known.integer_bits, self.context.config.compact)
        return problem and f"DIFFERS: {problem}"


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") or {}


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"

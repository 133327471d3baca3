"""The compiler: one straight line of stages, each an artifact on disk with a manifest."""

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_pipe import datasets
from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.manifest import Manifest, digest, file_digest
from qlora_pipe.artifacts.store import STATE, Artifact, Store, Ticket
from qlora_pipe.config import Config
from qlora_pipe.config_file import resolved_yaml
from qlora_pipe.config_training import Optimisation
from qlora_pipe.errors import ArtifactError, ConfigError, StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf import ranks
from qlora_pipe.hf.model import check_device
from qlora_pipe.hf.source import fetch
from qlora_pipe.known import CHAIN
from qlora_pipe.meter import Meter
from qlora_pipe.plan import Plan, check_memory, know, plan_known
from qlora_pipe.selection import read_index_map
from qlora_pipe.sources import BASE_LINK, find_model, model_files
from qlora_pipe.stages import (
    align,
    allocate,
    calibrate,
    compact,
    decompose,
    evaluate,
    export,
    prune,
    recover,
    refine,
    score,
    select,
    source,
    train,
)
from qlora_pipe.stages.base import Context, Stage
from quant.exceptions import QuantError

STAGES = (
    source.STAGE,
    calibrate.STAGE,
    score.STAGE,
    allocate.STAGE,
    decompose.STAGE,
    refine.STAGE,
    select.STAGE,
    prune.STAGE,
    align.STAGE,
    train.STAGE,
    compact.STAGE,
    recover.STAGE,
    export.STAGE,
    evaluate.STAGE,
)
_TROUBLE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES", "EPERM", "ESTALE", "EMFILE", "ENFILE", "ENOMEM")
}
"""What the user can mend; any other OSError is a defect of ours."""

assert tuple(stage.name for stage in STAGES) == CHAIN


def compile_model(
    config: Config, reporter: Reporter, *, until: str = CHAIN[-1], start: str | None = None
) -> dict[str, Artifact]:
    """Run the chain up to `until`; what is there and whole is not done again.

    With `start`, earlier stages must be done already and `start` and all after it are made anew. Raises a
    QloraPipeError for everything the user can mend. Artifacts by stage name; of several processes (torchrun), which
    share the layers of score and decompose and the batches of training, rank 0 alone writes and has them.
    """
    assert config.run is not None
    ranks.start()
    _check_shares(config, until)
    check_device(config.device)
    if ranks.rank():
        _work()
        return {}
    store = Store(Path(config.run))
    with store.lock(), _told(reporter, store.run / STATE, until), _typed(reporter):
        run = _Run(config, reporter, store)
        for stage in STAGES[: CHAIN.index(until) + 1]:
            run.perform(stage, afresh=start is not None and CHAIN.index(stage.name) >= CHAIN.index(start), start=start)
        ranks.send(None)
        return run.artifacts


@contextmanager
def _told(reporter: Reporter, state: Path, until: str) -> Iterator[None]:
    """Keep in `state` what `qlora-pipe status` says of this run, its end and the reason of it too."""
    reporter.state = state
    try:
        reporter.note("begin", f"running up to {until}")
        yield
        reporter.note("end", f"done up to {until}")
    except BaseException as error:
        reporter.note("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        reporter.state = None


@contextmanager
def _typed(reporter: Reporter) -> Iterator[None]:
    """Trouble of the machine as the StageError of the stage that met it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _TROUBLE:
            raise
        raise StageError(
            f"{reporter.stage or 'run'}: {error.strerror} ({error.filename}); mend that and run again, finished stages "
            "are kept"
        ) from error
    except (MemoryError, RuntimeError) as error:
        # torch says so of the host in words alone.
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise StageError(
            f"{reporter.stage or 'run'}: out of memory; lower batch_size or length, set activation_checkpointing, or "
            "end what else takes memory, and run again: `qlora-pipe plan` says what each stage takes, finished stages "
            "are kept"
        ) from error


def _check_shares(config: Config, until: str) -> None:
    """Every process makes as many passes in a step of a training that they share; raises ConfigError."""
    guided, count = config.prune.method == "lora", ranks.count()
    trained: dict[str, tuple[bool, Optimisation]] = {
        "refine": (config.refine.enabled and config.refine.steps > 0, config.refine),
        "guide": (guided, config.guide),
        "align": (config.align.enabled, config.align),
        "train": (True, config.train),
        "compact": (config.compact.enabled and config.compact.steps > 0, config.compact),
    }
    for name, (used, settings) in trained.items():
        reached = CHAIN.index("select" if name == "guide" else name) <= CHAIN.index(until)
        if not used or not reached or count == 1:
            continue
        if config.device != "cpu":
            raise ConfigError(
                f"{count} processes train on the CPU only, but device is {config.device}: run up to decompose with "
                "them, and the rest with one"
            )
        if settings.accumulation % count:
            raise ConfigError(
                f"{count} processes share the passes of a step: expected {name}.accumulation to be a multiple of "
                f"{count}, found {settings.accumulation}; raise it, with a lower {name}.batch_size for as many rows a "
                "step, or start fewer processes"
            )


def _work() -> None:
    """What every process but rank 0 does: in silence, its share of stages that are shared, until no more come."""
    shared = {stage.name: stage.work for stage in STAGES if stage.work is not None}
    with open(os.devnull, "w") as nowhere:
        while (order := ranks.receive()) is not None:
            name, seen = order
            shared[name](Context(**seen, reporter=Reporter(stream=nowhere)))
            ranks.wait()


@dataclass
class _Run:
    """What the stages share: the model, what is known of it, and the artifacts made so far."""

    config: Config
    reporter: Reporter
    store: Store

    def __post_init__(self) -> None:
        datasets.check(self.config)
        found = find_model(self.config.model)
        if found.kind == "gguf":
            # Before a conversion that would not fit.
            check_memory(plan_known(know(self.config)), self.config)
        self.base = fetch(found, self.reporter)
        self.known = know(self.config, self.base)
        self.config = self.known.config
        plan = self._plan()
        if plan.settled:
            self.reporter.event("settled", plan.settled)
        self.store.link(BASE_LINK, self.base.resolve())
        # What was found for it holds, whatever machine reads this.
        self.store.put("config.yaml", resolved_yaml(self.config.model_copy(update={"train_budget": None})))
        self.artifacts: dict[str, Artifact] = {}

    def _plan(self) -> Plan:
        """Write plan.json, and return it; raises PlanError if the run would not fit."""
        plan = plan_known(self.known)
        check_memory(plan, self.config)
        self.store.put("plan.json", json.dumps(plan.to_json(), indent=2) + "\n")
        return plan

    def perform(self, stage: Stage, *, afresh: bool, start: str | None) -> None:
        """Take the stage's artifact if it is there, else make it."""
        self.reporter.stage = stage.name
        # Its inputs and what is there of it are hashed before anything else is said.
        self.reporter.note("enter", "looking for what is done")
        ticket = self._ticket(stage)
        known = None if afresh else self.store.find(ticket)
        if known is not None:
            self.reporter.event("done", "done already, nothing to do", identity=ticket.identity)
        elif start is not None and not afresh:
            raise ArtifactError(
                f"--from {start}: stage {stage.name} is not done with these settings; run without --from first"
            )
        else:
            self._explain(ticket)
            known = self._make(stage, ticket)
        self.artifacts[stage.name] = known
        if stage.name == "allocate":
            body = json.loads((known.folder / "allocation.json").read_text())
            self.known = self.known.with_allocation(read_allocation(body))
            self._plan()
        elif stage.name == "select":
            kept = read_index_map(known.folder, self.artifacts["source"].manifest, self.known.architecture.layers)
            self.known = self.known.with_kept(kept.kept_shapes)
            self._plan()
        self.reporter.stage = ""

    def _ticket(self, stage: Stage) -> Ticket:
        inputs = {name: self.artifacts[name].identity for name in stage.inputs}
        inputs |= {f"data:{name}": datasets.fingerprint(data) for name, data in stage.data(self.config).items()}
        if not stage.inputs:
            inputs["model"] = digest({path.name: file_digest(path) for path in model_files(self.base)})
        return Ticket(stage.name, stage.code_version, settings_of(stage, self.config), inputs)

    def _make(self, stage: Stage, ticket: Ticket) -> Artifact:
        planned = self.known.files(stage.name)
        with Meter() as meter, self.store.writing(ticket) as out:
            seen: dict[str, Any] = {
                "config": self.config,
                "known": self.known,
                "base": self.base,
                "inputs": {name: self.artifacts[name] for name in stage.inputs},
                "out": out,
                "work": self.store.work(ticket),
            }
            if stage.work is not None:
                ranks.send((stage.name, seen))
            try:
                stage.run(Context(**seen, reporter=self.reporter))
            except QuantError as error:
                raise StageError(f"{stage.name}: {error}") from error
            if stage.work is not None:
                ranks.wait()  # the others are done with the work folder, which goes now
            artifact = self.store.commit(ticket, out, planned)
        written = sum(entry.bytes for entry in artifact.manifest.files.values())
        self._keep_stats(stage.name, meter)
        self.reporter.event(
            "made",
            f"done in {meter.seconds:.0f} s, peak {meter.peak_bytes / 1e9:.2f} GB, {written / 1e6:.1f} MB written",
            identity=ticket.identity,
            seconds=meter.seconds,
            peak_bytes=meter.peak_bytes,
            bytes=written,
        )
        return artifact

    def _keep_stats(self, stage: str, meter: Meter) -> None:
        stats = read_stats(self.store.run)
        stats[stage] = {
            "seconds": meter.seconds,
            "peak_bytes": meter.peak_bytes,
            # Sums on the CPU depend on what they are shared among.
            "threads": torch.get_num_threads(),
            "processes": ranks.count(),
        }
        self.store.put("stats.json", json.dumps(stats, indent=2) + "\n")

    def _explain(self, ticket: Ticket) -> None:
        """Say why the stage runs: first time, or what differs from the artifact that is there."""
        before = self.store.current(ticket.stage)
        if before is None or before.identity == ticket.identity:
            self.reporter.event("start", "starting")
            return
        for line in changes(before, ticket):
            self.reporter.event("changed", line)


def settings_of(stage: Stage, config: Config) -> dict[str, Any]:
    """All settings that an artifact of the stage is made with, those of its data among them."""
    found = {
        f"data:{name}": data.model_dump(mode="json", exclude={"source"}) for name, data in stage.data(config).items()
    }
    return stage.settings(config) | found


def changes(before: Manifest, ticket: Ticket) -> list[str]:
    """What differs between an artifact and a request for it, one line each, old value and new."""
    found = []
    if before.code_version != ticket.code_version:
        found.append(f"the code of this stage changed: version {before.code_version} -> {ticket.code_version}")
    found += _differences("", before.settings, ticket.settings)
    for name in sorted(set(before.inputs) | set(ticket.inputs)):
        if before.inputs.get(name) != ticket.inputs.get(name):
            found.append(f"runs again because {name} changed")
    return found


def read_stats(run: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of the stages, as last measured; empty if there are none."""
    try:
        stats = json.loads((run / "stats.json").read_text())
    except (OSError, ValueError):
        return {}
    return stats if isinstance(stats, dict) else {}


def _differences(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(f"{prefix}{key}.", before, after)
        elif before != after:
            found.append(f"{prefix}{key} changed: {before} -> {after}")
    return found

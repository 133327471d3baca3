"""The plan: bytes and peak memory of every stage, from headers alone. No torch, no transformers, no weight."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.budget import require_feasible
from qlora_pipe.config import Config
from qlora_pipe.errors import PlanError
from qlora_pipe.known import CHAIN, Known, estimate_allocation
from qlora_pipe.memory import peak_bytes, scratch_bytes
from qlora_pipe.shapes import check_shapes
from qlora_pipe.sources import ModelSource, architecture_of, find_model
from qlora_pipe.train_budget import check_training, settled, told
from qlora_pipe.units import format_bytes, parse_bytes


@dataclass(frozen=True)
class StagePlan:
    """One stage: tensors written, bytes read and written, exact weight files, peak memory and disk while it runs, in
    bytes."""

    name: str
    tensors: int
    reads: int
    writes: int
    files: dict[str, int]
    host_peak: int
    device_peak: int
    scratch: int


@dataclass(frozen=True)
class Plan:
    """`exact`: allocation and widths are decided, so that the bytes of every file are final; before that an estimate.

    `fits` is None where the configuration states no limit; `settled` says what `train_budget` leaves of bits and
    structure, if there is one.
    """

    model: str
    run: str
    exact: bool
    stages: tuple[StagePlan, ...]
    disk: int
    scratch: int
    host_peak: int
    device_peak: int
    fits_host: bool | None
    fits_device: bool | None
    settled: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: Config, base: Path | None = None) -> Plan:
    """Plan a run. `base`: the model's folder if it is known already; otherwise the model is looked up, not fetched.

    Raises SourceError, UnsupportedModel, ConfigError, BudgetError as the run itself would.
    """
    return plan_known(know(config, base))


def know(config: Config, base: Path | None = None) -> Known:
    """What headers tell: the architecture, dtypes, and an estimated allocation; and the configuration, with the bits
    and the structure that `train_budget` leaves."""
    source = ModelSource("folder", config.model, base) if base else find_model(config.model)
    if source.path is None:
        from qlora_pipe.hf.hub import cached

        source = ModelSource("folder", source.name, cached(source.name))
    architecture = architecture_of(source)
    check_shapes(architecture, config)
    dtypes = {}
    if source.kind == "folder" and source.path is not None:
        dtypes = {name: place.spec.dtype for name, place in read_folder(source.path).items()}
    require_feasible(architecture, dtypes, config)
    config = settled(config, architecture, dtypes)
    estimate = estimate_allocation(architecture, dtypes, config)
    converts = source.kind == "gguf"
    folder = source.path if source.kind == "folder" else None
    return Known(config, architecture, dtypes, estimate, allocation_is_final=False, converts=converts, folder=folder)


def plan_known(known: Known) -> Plan:
    """The plan that follows from what is known."""
    config = known.config
    stages = tuple(_stage(name, known) for name in CHAIN)
    host, device = max(s.host_peak for s in stages), max(s.device_peak for s in stages)
    return Plan(
        model=config.model,
        run=str(config.run),
        exact=known.is_final,
        stages=stages,
        disk=sum(stage.writes for stage in stages),
        scratch=max(stage.scratch for stage in stages),
        host_peak=host,
        device_peak=device,
        fits_host=_fits(host, config.memory.host),
        fits_device=_fits(device, config.memory.device),
        settled=None if config.train_budget is None else f"train_budget {config.train_budget}: {told(config)}",
    )


def check_memory(plan: Plan, config: Config) -> None:
    """Refuse a plan that exceeds the stated memory; raises PlanError naming the stage and the figures."""
    for fits, peak, limit, name in (
        (plan.fits_host, plan.host_peak, config.memory.host, "host"),
        (plan.fits_device, plan.device_peak, config.memory.device, "device"),
    ):
        if fits is False:
            worst = max(plan.stages, key=lambda stage: getattr(stage, f"{name}_peak"))
            raise PlanError(
                f"stage {worst.name} needs {format_bytes(peak)} of {name} memory, memory.{name} allows {limit}; "
                "use a smaller batch or length, activation_checkpointing, a lower budget, or raise the limit"
            )
    if plan.exact:
        check_training(config, {s.name: s.host_peak if config.device == "cpu" else s.device_peak for s in plan.stages})


def render_plan(plan: Plan) -> str:
    """The plan as a table for people."""
    rows: list[tuple[str, ...]] = [("stage", "tensors", "reads", "writes", "scratch", "host peak", "device peak")]
    for stage in plan.stages:
        sizes = (stage.reads, stage.writes, stage.scratch, stage.host_peak, stage.device_peak)
        rows.append((stage.name, str(stage.tensors), *(format_bytes(size) for size in sizes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{plan.model} -> {plan.run}"]
    lines += [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.append(
        f"disk {format_bytes(plan.disk)}, and scratch {format_bytes(plan.scratch)}, "
        f"host peak {format_bytes(plan.host_peak)}{_verdict(plan.fits_host)}, "
        f"device peak {format_bytes(plan.device_peak)}{_verdict(plan.fits_device)}"
    )
    if plan.settled:
        lines.append(plan.settled)
    if not plan.exact:
        lines.append(
            "bytes of decompose, prune and export.packed are an estimate until allocate has run, and select if "
            "prune.widths is allocated: a uniform choice in budget"
        )
    return "\n".join(lines)


def _stage(name: str, known: Known) -> StagePlan:
    files = known.files(name)
    host, device = peak_bytes(name, known)
    return StagePlan(
        name=name,
        tensors=known.tensor_count(name),
        reads=known.reads(name),
        writes=sum(files.values()),
        files=files,
        host_peak=host,
        device_peak=device,
        scratch=scratch_bytes(name, known),
    )


def _fits(peak: int, limit: str | None) -> bool | None:
    return None if limit is None else peak <= parse_bytes(limit)


def _verdict(fits: bool | None) -> str:
    return {None: "", True: " (fits)", False: " (DOES NOT FIT)"}[fits]

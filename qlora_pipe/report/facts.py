"""What a run folder says about itself, read once. Stages that are not there leave None or nothing behind."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qlora_pipe import sparsity
from qlora_pipe.artifacts.manifest import Manifest, read_manifest
from qlora_pipe.config_yaml import parse_yaml
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.known import CHAIN
from quant.storage import Choice

MODELS = {
    "base": "the original model",
    "decomposed": "quantised plus low rank, full shape",
    "pruned": "the same with groups removed, or zeros",
    "aligned": "pruned, made up for on generic text",
    "trained-small": "the small model with the task's adapter",
    "compact": "small integer model, as trained",
    "full+recovered": "original with the recovered adapter",
    "decomposed+recovered": "decomposed with the recovered adapter",
}
"""The models of the chain in order, each in a few words."""

PRODUCTS = ("compact", "full+recovered", "decomposed+recovered")
"""What a run hands out; the other models are steps on the way."""

_GRIDS = {"lloyd": "Lloyd levels", "int": "signed integers", "uint": "integers with zero points"}


class ModelRow(NamedTuple):
    """A model of the chain: perplexity by data set, bits per block weight, bytes on disk."""

    name: str
    perplexity: dict[str, float]
    bits: float
    bytes: int


class StageRow(NamedTuple):
    """A stage: what was measured and planned, in seconds and bytes; None where nothing is known."""

    name: str
    state: str
    seconds: float | None
    measured: int | None
    planned: int | None
    written: int | None


class Kept(NamedTuple):
    """What pruning left of one layer, and of how many."""

    kv_heads: int
    all_kv_heads: int
    ffn: int
    all_ffn: int


@dataclass(frozen=True)
class Facts:
    """Everything the report tells, as it lies in the run folder."""

    run: Path
    config_text: str
    settings: dict[str, Any]
    plan: dict[str, Any]
    stats: dict[str, Any]
    manifests: dict[str, Manifest]
    source: dict[str, Any]
    allocation: dict[str, Any] | None
    kept: tuple[Kept, ...]
    selection: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    recovery: dict[str, Any] | None
    histories: dict[str, list[dict[str, float]]]
    skipped: dict[str, str]

    @property
    def title(self) -> str:
        """The model as the user named it, without its kind or folder."""
        return str(self.settings.get("model", self.run.name)).rpartition("/")[2].removeprefix("package:")

    @property
    def datasets(self) -> list[str]:
        """Names of the held-out texts, in the order they were measured."""
        return list(dict.fromkeys(str(row["dataset"]) for row in self.metrics))

    def models(self) -> list[ModelRow]:
        """The rows of metrics.json grouped by model."""
        found: dict[str, ModelRow] = {}
        for row in self.metrics:
            name = str(row["model"])
            empty = ModelRow(name, {}, float(row["bits_per_weight"]), int(row["bytes"]))
            found.setdefault(name, empty).perplexity[str(row["dataset"])] = float(row["perplexity"])
        return list(found.values())

    def stages(self) -> list[StageRow]:
        """All stages of the chain, done or not."""
        plans = {row["name"]: row for row in self.plan.get("stages", [])}
        return [self._stage(name, plans.get(name, {})) for name in CHAIN]

    def stale(self, name: str) -> bool:
        """Whether a stage was made from something that is no longer there: its figures are of other settings."""
        inputs = self.manifests[name].inputs.items()
        return any(
            key in self.manifests and (self.manifests[key].identity != value or self.stale(key))
            for key, value in inputs
        )

    def _stage(self, name: str, plan: Mapping[str, Any]) -> StageRow:
        manifest, stats = self.manifests.get(name), self.stats.get(name, {})
        state = "skipped" if name in self.skipped else "done" if manifest else "not run"
        if manifest is not None and self.stale(name):
            state = "stale"
        if manifest is None:
            return StageRow(name, state, None, None, plan.get("host_peak") or None, None)
        written = sum(entry.bytes for entry in manifest.files.values())
        measured = stats.get("peak_bytes") or None
        return StageRow(name, state, stats.get("seconds"), measured, plan.get("host_peak") or None, written)

    def configurations(self) -> list[tuple[str, int, int]]:
        """(configuration, matrices that take it, their bytes), the dearest configuration first."""
        rows = list(self.allocation["choices"].values()) if self.allocation else []
        count = Counter(map(Choice.from_json, rows))
        size: Counter[Choice] = Counter()
        for row in rows:
            size[Choice.from_json(row)] += row["bytes"]
        ordered = sorted(count, key=lambda it: (-it.bits, it.block_size, -it.rank, it.name))
        return [(configuration_name(it), count[it], size[it]) for it in ordered]


def configuration_name(choice: Choice) -> str:
    """A configuration for people; what is usual goes without saying."""
    parts = [f"{choice.bits} bits", f"blocks of {choice.block_size}", f"rank {choice.rank}"]
    if choice.grid != "nf":
        parts.append(_GRIDS[choice.grid])
    if choice.direct:
        parts.append(f"{choice.scale_dtype} scales")
    elif choice.scale_bits != Choice.scale_bits or choice.scale_dtype != Choice.scale_dtype:
        parts.append(f"{choice.scale_bits}-bit scales under {choice.scale_dtype}")
    if choice.superblock is not None:
        parts.append(f"superblocks of {choice.superblock}")
    if choice.factor_dtype != Choice.factor_dtype:
        parts.append(f"{choice.factor_dtype} factors")
    return ", ".join(parts)


def kept_counts(record: Mapping[str, Any]) -> tuple[Kept, ...]:
    """Groups that each layer keeps, from kept.json; counts only, so that torch is not needed."""
    return tuple(
        Kept(
            _count(entry["kv_heads"]),
            int(entry["original"]["kv_heads"]),
            _count(entry["ffn"]),
            int(entry["original"]["ffn"]),
        )
        for entry in record["layers"]
    )


def selection_rows(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) of selection.json: how much goes, by which scores, and the certificate if widths were solved."""
    if "sparsity" in body:
        return sparsity.rows(body)
    nominal, proof = body["nominal"], body["certificate"]
    asked = "" if body["ratio"] is None else f", at least {100 * body['ratio']:g} % asked for"
    rows = [
        ("scores", body["method"]),
        ("true reduction", f"{100 * body['true_reduction']:.2f} % of the blocks' parameters{asked}"),
        ("nominal", f"{100 * nominal['kv']:.1f} % of the KV groups, {100 * nominal['ffn']:.1f} % of the FFN channels"),
        ("score that goes" if body["measured"] is None else "measured loss, nats a token", f"{body['loss']:.6g}"),
    ]
    if proof is None:
        return rows
    verdict = "proved optimal" if proof["optimal"] else f"within {100 * proof['gap']:.3g} % of the optimum"
    return [
        *rows,
        ("with uniform widths", f"{body['loss_uniform']:.6g}"),
        ("certificate", f"{verdict}, no widths can go below {proof['bound']:.6g}"),
    ]


def read_facts(run: Path) -> Facts:
    """Read a run folder; raises ArtifactError if it is none, or if a file in it cannot be read."""
    if not run.is_dir():
        raise ArtifactError(f"{run}: expected a run folder, found none; run the chain first")
    manifests = {name: read_manifest(run / name) for name in CHAIN if (run / name).exists()}
    text = _text(run / "config.yaml")
    histories = {name: read_json(run / name / "history.json") for name in ("select", "align", "train", "compact")}
    skipped = {name: read_json(run / name / "skipped.json") for name in manifests}
    kept = read_json(run / "select" / "kept.json")
    return Facts(
        run=run,
        config_text=text,
        settings=_settings(text, run),
        plan=read_json(run / "plan.json") or {},
        stats=read_json(run / "stats.json") or {},
        manifests=manifests,
        source=read_json(run / "source" / "source.json") or {},
        allocation=read_json(run / "allocate" / "allocation.json"),
        kept=kept_counts(kept) if kept else (),
        selection=read_json(run / "select" / "selection.json"),
        metrics=read_json(run / "evaluate" / "metrics.json") or [],
        recovery=read_json(run / "recover" / "recovery.json"),
        histories={name: rows for name, rows in histories.items() if rows},
        skipped={name: str(body.get("reason", "")) for name, body in skipped.items() if body},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: expected a readable text file, found {error}; run the chain again") from error


def read_json(path: Path) -> Any:
    """A JSON document, None if there is none; raises ArtifactError if it cannot be read."""
    text = _text(path)
    try:
        return json.loads(text) if text else None
    except ValueError as error:
        raise ArtifactError(f"{path}: expected JSON, found {error}; run the chain again") from error


def _settings(text: str, run: Path) -> dict[str, Any]:
    try:
        found, _ = parse_yaml(text) if text else ({}, {})
    except ConfigError as error:
        raise ArtifactError(f"{run / 'config.yaml'}:{error}; run the chain again") from error
    return found if isinstance(found, dict) else {}


def _count(ranges: str) -> int:
    """How many numbers `0-63,70` names."""
    ends = (part.partition("-")[::2] for part in ranges.split(","))
    return sum(int(last or first) - int(first) + 1 for first, last in ends)

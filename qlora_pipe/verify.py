"""Checking a run or an artifact: every hash, every link between stages, and what must hold inside each stage."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune.correction import within_limit
from prune.exceptions import PruneError
from prune.indexmap import IndexMap
from prune.scatter import restrict_adapter, scatter_adapter
from qlora_pipe.allocation import recheck
from qlora_pipe.artifacts.layout import is_weights
from qlora_pipe.artifacts.manifest import MANIFEST, Manifest, check_files, read_manifest
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.errors import ArtifactError, ConfigError, SourceError
from qlora_pipe.inspection import plural, stages_of, weight_sets
from qlora_pipe.known import CHAIN
from qlora_pipe.selection import recheck as recheck_selection
from qlora_pipe.units import format_bytes
from qlora_pipe.verify_integers import check_exported
from qlora_pipe.verify_sparse import check_masks, check_zeros, linear_maps
from quant.pack import pack, unpack
from quant.storage import Choice
from solver import SolverError

_AGAIN = "run the stage again"
_TOLERANCE = 1e-9
"""Relative; sums of losses may have been taken in another order."""


def verify_path(path: Path) -> Iterator[str]:
    """One line per artifact of `path` (a run, or one artifact) that holds.

    Raises ArtifactError on the first that does not, with what was expected, what was found and what to do.
    Peak bytes: one tensor, and beside a recovered adapter's factor the one it was scattered from.
    """
    if (path / MANIFEST).is_file():
        yield _verify_artifact(path)
        return
    for stage in stages_of(path):
        line = _verify_artifact(path / stage)
        check_lineage(path, stage)
        across = _ACROSS.get(stage)
        if across is not None:
            with _one_kind_of_error(path / stage):
                across(path)
        yield line


def _verify_artifact(folder: Path) -> str:
    """Hashes, plan and invariants of one artifact; the line that says so."""
    manifest = check_files(folder)
    _check_plan(folder, manifest)
    with _one_kind_of_error(folder):
        tensors = sum(_check_tensors(TensorReader(folder / place, stem)) for place, stem in weight_sets(manifest))
        check = _CHECKS.get(manifest.stage)
        if check is not None:
            check(folder)
    size = sum(entry.bytes for entry in manifest.files.values())
    inside = f", {plural(tensors, 'tensor')}" if tensors else ""
    files = plural(len(manifest.files), "file")
    return f"{manifest.stage:<10} {manifest.identity[:12]}  whole: {files}, {format_bytes(size)}{inside}"


@contextmanager
def _one_kind_of_error(folder: Path) -> Iterator[None]:
    """What goes wrong while contents are read is a defect of the artifact."""
    try:
        yield
    except (SourceError, PruneError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder}: expected a whole artifact, found {error!r}; {_AGAIN}") from error


def _check_plan(folder: Path, manifest: Manifest) -> None:
    """The plan named every weight file, to the byte."""
    written = {name: entry.bytes for name, entry in manifest.files.items() if is_weights(name)}
    for name in sorted(written | manifest.planned):
        if written.get(name) != manifest.planned.get(name):
            raise ArtifactError(
                f"{folder / name}: planned {manifest.planned.get(name)} bytes, found {written.get(name)}; {_AGAIN}"
            )


def check_lineage(run: Path, stage: str) -> None:
    """The artifact under a stage's name is that stage's, made from what its inputs are now."""
    manifest = read_manifest(run / stage)
    if manifest.stage != stage:
        raise ArtifactError(f"{run / stage}: expected an artifact of {stage}, found one of {manifest.stage}; {_AGAIN}")
    for name, made_from in manifest.inputs.items():
        if name in CHAIN:
            now = read_manifest(run / name).identity
            if now != made_from:
                raise ArtifactError(
                    f"{run / stage}: stage {stage} is stale: it was made from {name} {made_from[:12]}, but {name} is "
                    f"now {now[:12]}; run the chain again, {stage} and what follows is made anew"
                )


def _check_tensors(reader: TensorReader) -> int:
    """Finite floats, positive steps, codes in range, ranks that agree; the number of tensors."""
    for name, place in reader.locations.items():
        if name.endswith(".lora_A.weight"):
            _check_rank(reader, name)
        tensor = reader.read(name)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = (value.item() for value in torch.aminmax(tensor))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ArtifactError(f"{place.file}: tensor {name} holds NaN or Inf, expected finite numbers; {_AGAIN}")
        stem, _, kind = name.rpartition(".")
        # A packed map may hold blocks of zeros, whose scale is zero; the steps of L4Q are trained and stay positive.
        if kind == "scale" and low <= 0 and f"{stem}.levels" not in reader:
            raise ArtifactError(f"{place.file}: tensor {name}: expected steps > 0, found {low:g}; {_AGAIN}")
        if kind in ("scale_max", "input", "gradient") and low < 0:
            raise ArtifactError(f"{place.file}: tensor {name}: expected values >= 0, found {low:g}; {_AGAIN}")
        if kind == "levels":
            _check_codes(reader, name)
    return len(reader.locations)


def _check_codes(reader: TensorReader, name: str) -> None:
    """Levels increase, every code has one, and what pads a row of codes is zero."""
    place, levels, stem = reader.locations[name], reader.read(name), name.removesuffix("levels")
    shape = {kind: reader.locations[f"{stem}{kind}"].spec.shape for kind in ("codes", "lowrank_left", "lowrank_right")}
    if not bool((levels.diff() > 0).all()):
        raise ArtifactError(f"{place.file}: tensor {name}: expected increasing levels, found others; {_AGAIN}")
    bits = (len(levels) - 1).bit_length()
    sides = shape["lowrank_left"][0], shape["lowrank_right"][1]
    codes = {f"{stem}codes": sides[1] if shape["codes"][0] == sides[0] else sides[0]}
    if f"{stem}zero_codes" in reader and f"{stem}scale" in reader:
        codes[f"{stem}zero_codes"] = reader.locations[f"{stem}scale"].spec.shape[1]
    for packed, columns in codes.items():
        words = reader.read(packed)
        found = unpack(words, bits, columns)
        if int(found.max()) >= len(levels) or not torch.equal(pack(found, bits), words):
            raise ArtifactError(
                f"{place.file}: tensor {packed}: expected {columns} codes below {len(levels)} and zeros behind them, "
                f"found others; {_AGAIN}"
            )


def _check_rank(reader: TensorReader, name: str) -> None:
    other = f"{name.removesuffix('.lora_A.weight')}.lora_B.weight"
    place = reader.locations[name]
    rank, rank_b = place.spec.shape[0], reader.locations[other].spec.shape[1]
    if rank != rank_b:
        raise ArtifactError(f"{place.file}: {name} has rank {rank}, {other} has rank {rank_b}; {_AGAIN}")


def _check_table(folder: Path) -> None:
    for name, rows in _read(folder / "table.json").items():
        for row in rows:
            if row["bytes"] <= 0 or not _is_loss(row["loss"]):
                raise ArtifactError(f"{folder / 'table.json'}: {name}: expected bytes > 0 and a loss >= 0, found {row}")
            Choice.from_json(row)


def _check_allocation(folder: Path) -> None:
    """Cost, loss and ties follow from the choices; the budget holds, and the bound is not above the loss."""
    path = folder / "allocation.json"
    body = _read(path)
    choices = body["choices"]
    cost = sum(row["bytes"] for row in choices.values())
    if cost != body["bytes"]:
        raise ArtifactError(f"{path}: the choices take {cost} bytes, the file says {body['bytes']}; {_AGAIN}")
    if cost > body["budget_bytes"]:
        raise ArtifactError(f"{path}: {cost} bytes exceed the budget of {body['budget_bytes']}; {_AGAIN}")
    loss = math.fsum(row["loss"] for row in choices.values())
    if not (_is_loss(loss) and math.isclose(loss, body["loss"], rel_tol=_TOLERANCE)):
        raise ArtifactError(f"{path}: the choices lose {loss}, the file says {body['loss']}; {_AGAIN}")
    if not 0 <= body["bound"] <= loss * (1 + _TOLERANCE):
        raise ArtifactError(f"{path}: expected a bound between 0 and the loss {loss}, found {body['bound']}; {_AGAIN}")
    for group in body["ties"]:
        if len({Choice.from_json(choices[name]) for name in group}) > 1:
            raise ArtifactError(f"{path}: {', '.join(group)} are tied but differ; {_AGAIN}")


def _check_certificate(run: Path) -> None:
    """Selection, cost, loss, ties, rules and bound follow from the table."""
    path = run / "allocate" / "allocation.json"
    try:
        recheck(_read(run / "score" / "table.json"), _read(path))
    except (SolverError, ConfigError) as error:
        raise ArtifactError(f"{path}: {error}; {_AGAIN}") from error


def _check_selection(folder: Path) -> None:
    """The record is valid, and widths, totals and the certificate follow from the scores."""
    kept, body = _kept(folder), _read(folder / "selection.json")
    if body["index_map"] != kept.digest():
        raise ArtifactError(f"{folder / 'selection.json'}: it is about another index map than kept.json; {_AGAIN}")
    if "sparsity" in body:
        check_masks(folder, body, kept)
        return
    try:
        recheck_selection(_read(folder / "scores.json"), _read(folder / "table.json"), body, kept)
    except SolverError as error:
        raise ArtifactError(f"{folder / 'selection.json'}: {error}; {_AGAIN}") from error


def _check_selected(run: Path) -> None:
    """The groups were selected for the model of this run."""
    path, model = run / "select" / "selection.json", read_manifest(run / "source").inputs["model"]
    if _read(path)["model"] != model:
        raise ArtifactError(f"{path}: it is of the model {_read(path)['model']}, the run has {model}; {_AGAIN}")


def _check_sliced(run: Path) -> None:
    """Every sliced matrix has the rows that kept.json says, and zeros where masks do."""
    kept = _kept(run / "select")
    reader = TensorReader(run / "prune")
    for name, layer, role, _ in linear_maps(kept):
        expected, found = len(kept.kept_indices(layer, role)), reader.locations[f"{name}.codes"].spec.shape[0]
        if found != expected:
            raise ArtifactError(f"{run / 'prune'}: {name}.codes has {found} rows, kept.json keeps {expected}; {_AGAIN}")
    if "sparsity" in _read(run / "select" / "selection.json"):
        check_zeros(run, kept, _read(run / "allocate" / "allocation.json"))


def _check_recovery(folder: Path) -> None:
    """The chosen scale was tried, and none that was tried is better."""
    path = folder / "recovery.json"
    body = _read(path)
    losses = {float(scale): loss for scale, loss in body["loss_by_scale"].items()}
    if not all(_is_loss(loss) for loss in losses.values()):
        raise ArtifactError(f"{path}: expected finite losses >= 0, found {losses}; {_AGAIN}")
    if 0.0 not in losses or losses.get(body["scale"]) != min(losses.values()):
        raise ArtifactError(f"{path}: scale {body['scale']} is not the best of {losses}; {_AGAIN}")
    for other in body.get("rejected", ()):
        if not min(losses.values()) <= min(other["loss_by_scale"].values()):
            raise ArtifactError(f"{path}: correction {other['correction']} is better than the chosen one; {_AGAIN}")


def _check_metrics(folder: Path) -> None:
    path = folder / "metrics.json"
    for row in _read(path):
        where, value = f"{path}: {row['model']} on {row['dataset']}", row["perplexity"]
        if not (math.isfinite(value) and value >= 1):
            raise ArtifactError(f"{where}: expected a finite perplexity >= 1, found {value}; {_AGAIN}")
        if row["tokens"] <= 0 or row["bytes"] <= 0 or not row["bits_per_weight"] > 0:
            raise ArtifactError(f"{where}: expected tokens, bytes and bits above 0, found {row}; {_AGAIN}")


_CHECKS: dict[str, Callable[[Path], None]] = {
    "score": _check_table,
    "allocate": _check_allocation,
    "select": _check_selection,
    "recover": _check_recovery,
    "evaluate": _check_metrics,
}


def _check_scattered(run: Path) -> None:
    """Every recovered adapter equals the small one on the kept block, to the bit, and is zero elsewhere; of a corrected
    one that holds for A, and B is zero elsewhere and not moved by more than corrections may."""
    folder, kept = run / "recover", _kept(run / "select")
    report = _read(folder / "recovery.json")
    if report.get("index_map") != kept.digest():
        raise ArtifactError(f"{folder}: the adapter was scattered by another kept.json than select's; {_AGAIN}")
    for stage, stem in (("train", "adapter"), ("compact", "compact_adapter")):
        if not any(folder.glob(f"{stem}*.safetensors")):
            continue
        small, full = TensorReader(run / stage, "adapter"), TensorReader(folder, stem)
        for name, layer, role, sides in linear_maps(kept):
            indices = kept.kept_indices(layer, role)
            trained, found = _factors(small, name), _factors(full, name)
            if stem == "adapter" and report.get("correction", "none") != "none":
                corrected = restrict_adapter(*found, role, indices)[1]
                if not within_limit(*trained, corrected):
                    raise ArtifactError(f"{folder}: {stem} {name} is corrected by more than the limit; {_AGAIN}")
                trained = trained[0], corrected
            if not all(map(torch.equal, scatter_adapter(*trained, role, indices, sides), found)):
                raise ArtifactError(
                    f"{folder}: {stem} {name} differs from the adapter of {stage} at the kept indices; {_AGAIN}"
                )


def _check_cut(run: Path) -> None:
    """Slot C that was not trained further is what LoRAPrune's loop left, at the kept indices, to the bit."""
    settings = read_manifest(run / "align").settings
    if settings.get("enabled") or not settings.get("guided"):
        return
    kept, full, small = (
        _kept(run / "select"),
        TensorReader(run / "select", "adapter"),
        TensorReader(run / "align", "adapter"),
    )
    for name, layer, role, _ in linear_maps(kept):
        expected = restrict_adapter(*_factors(full, name), role, kept.kept_indices(layer, role))
        if not all(map(torch.equal, expected, _factors(small, name))):
            raise ArtifactError(f"{run / 'align'}: {name} is not select's adapter at the kept indices; {_AGAIN}")


_ACROSS: dict[str, Callable[[Path], None]] = {
    "allocate": _check_certificate,
    "select": _check_selected,
    "prune": _check_sliced,
    "align": _check_cut,
    "recover": _check_scattered,
    "export": lambda run: check_exported(run, _kept(run / "select")),
}
"""What a stage's artifact owes to those of other stages; takes the run."""


def _factors(reader: TensorReader, name: str) -> tuple[Tensor, Tensor]:
    return reader.read(f"{name}.lora_A.weight"), reader.read(f"{name}.lora_B.weight")


def _kept(folder: Path) -> IndexMap:
    try:
        return IndexMap.from_json(_read(folder / "kept.json"))
    except PruneError as error:
        raise ArtifactError(f"{folder / 'kept.json'}: {error}; {_AGAIN}") from error


def _is_loss(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: expected JSON, found {error}; {_AGAIN}") from error

"""Adapters out of adapters: sums, differences and truncations, one matrix at a time."""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_pipe.adapters.folder import CONFIG, Adapter, Site, read_adapter, stored
from qlora_pipe.artifacts.layout import TensorSpec
from qlora_pipe.artifacts.publish import new_folder
from qlora_pipe.artifacts.tensors import TensorWriter, dtype_code, torch_dtype_of
from qlora_pipe.errors import ConfigError, WeightError
from qlora_pipe.exporters.peft import STEM
from qlora_pipe.report.table import render
from quant.adapters import product_norm, product_svd, rank_of_energy, truncated

REPORT = "adapter_report.json"
"""What was done to an adapter and what it cost, beside the adapter."""

_APPROXIMATE = (
    "LoftQ leaves a residual: the base it trains on and the factors it starts from add up to the original model but "
    "for what its low rank cannot hold; on the original this adapter is off by that"
)
"""Of a difference to LoftQ's start: W = Q + B0 A0 + R, and training saw Q + B A (arXiv 2310.08659)."""

# How factors were begun and trained; what is left of it would make PEFT begin them so again.
_OVER = ("corda_config", "eva_config", "loftq_config", "lora_ga_config", "velora_config", "peft_version")
_WHERE = ("exclude_modules", "layers_pattern", "layers_to_transform")


@dataclass(frozen=True)
class Cut:
    """What rank the result has: `rank` at most, or what keeps the share `energy` of a matrix' squared singular values;
    neither: that of all factors together."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"--rank: expected at least 1, found {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(f"--energy: expected a share above 0, 1 at most, found {self.energy}")


@dataclass(frozen=True)
class Sum:
    """Weighted adapters of one model; matrix by matrix, each may be absent."""

    parts: Sequence[tuple[Adapter, float]]

    def names(self) -> list[str]:
        """Every linear map that one of them adapts."""
        return list(dict.fromkeys(name for adapter, _ in self.parts for name in adapter.sites))

    def of(self, name: str) -> list[tuple[Adapter, Site, float]]:
        """Those that adapt the map, with what each counts there: its weight times its strength."""
        found = [(adapter, adapter.sites[name], weight) for adapter, weight in self.parts if name in adapter.sites]
        return [(adapter, site, weight * site.strength) for adapter, site, weight in found]

    def update(self, name: str, unit: float = 1.0) -> tuple[Tensor, Tensor]:
        """float64 factors [out, ranks] and [ranks, in] of the exact sum in multiples of `unit`, side by side."""
        pairs = [(adapter.factors(name), count / unit) for adapter, _, count in self.of(name)]
        left = torch.cat([lora_b.double() * count for (_, lora_b), count in pairs], dim=1)
        return left, torch.cat([lora_a.double() for (lora_a, _), _ in pairs])

    def unit(self, name: str) -> float:
        """The strength under which factors side by side are those that are stored, bit for bit, where all of them
        count the same up to a sign."""
        return next((abs(count) for _, _, count in self.of(name) if count), 1.0)


def truncate(folder: Path, output: Path, cut: Cut, dtype: str | None) -> str:
    """Write the best adapter of lower rank; what it lost, as text. Raises ConfigError where nothing would be cut."""
    if (cut.rank is None) == (cut.energy is None):
        raise ConfigError("expected one of --rank and --energy; give the rank, or the share of the energy that is kept")
    adapter = read_adapter(folder)
    largest = max(site.rank for site in adapter.sites.values())
    if cut.rank is not None and cut.rank >= largest:
        raise ConfigError(f"{folder}: no matrix has a rank above {largest}; expected --rank below it, found {cut.rank}")
    return _write(Sum([(adapter, 1.0)]), output, cut, dtype, "truncate")


def add(
    folders: Sequence[Path], weights: Sequence[float], output: Path, cut: Cut, dtype: str | None, force: bool
) -> str:
    """Write the weighted sum, exact if it is not cut; what it lost, as text. Maps that only some adapt are adapted.
    Raises ConfigError for another number of weights, or adapters of different models without `force`."""
    if len(weights) != len(folders):
        raise ConfigError(f"--weights: expected one for each of {len(folders)} adapters, found {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"--weights: expected finite numbers, found {', '.join(map(str, weights))}")
    adapters = [read_adapter(folder) for folder in folders]
    _check_together(adapters, force)
    return _write(Sum(list(zip(adapters, weights, strict=True))), output, cut, dtype, "add")


def subtract(trained: Path, start: Path, output: Path, cut: Cut, dtype: str | None, force: bool) -> str:
    """Write what training changed, of both ranks together: an adapter of the model as it was before an init took a part
    out of it (PiSSA, arXiv 2404.02948), exactly but for LoftQ. Raises ConfigError as `add`, WeightError if they adapt
    other maps."""
    adapters = [read_adapter(folder, decomposed=True) for folder in (trained, start)]
    _check_together(adapters, force)
    odd = sorted(adapters[0].sites.keys() ^ adapters[1].sites.keys())
    if odd:
        raise WeightError(
            f"expected two states of one adapter, found {odd[0]} in one of {trained} and {start} alone; give the "
            "adapter as it was saved before training"
        )
    return _write(Sum([(adapters[0], 1.0), (adapters[1], -1.0)]), output, cut, dtype, "subtract")


def check_sides(adapters: Sequence[Adapter]) -> None:
    """Raises WeightError where two adapters give one map different sides."""
    seen: dict[str, tuple[Adapter, tuple[int, int]]] = {}
    for adapter in adapters:
        for name, site in adapter.sites.items():
            other, sides = seen.setdefault(name, (adapter, site.sides))
            if site.sides != sides:
                raise WeightError(
                    f"{name} is {sides[0]} x {sides[1]} in {other.folder} and {site.sides[0]} x {site.sides[1]} in "
                    f"{adapter.folder}; expected adapters of one model"
                )


def _check_together(adapters: Sequence[Adapter], force: bool) -> None:
    check_sides(adapters)
    bases = dict.fromkeys(str(adapter.base) for adapter in adapters)
    if len(bases) > 1 and not force:
        raise ConfigError(
            f"expected adapters of one model, found base_model_name_or_path {' and '.join(bases)}; what was trained on "
            "one model means little on another. If these are names of the same, say --force"
        )


def _write(total: Sum, output: Path, cut: Cut, dtype: str | None, operation: str) -> str:
    """Peak bytes: the factors of one matrix a few times, in float64. Twice through the files where ranks follow the
    energy."""
    ranks = {name: _rank(total, name, cut) for name in total.names()}
    code = dtype_code(_dtype(total, dtype))
    layout: dict[str, TensorSpec] = {}
    for name, rank in ranks.items():
        rows, columns = total.of(name)[0][1].sides
        layout[stored(name, "A")] = TensorSpec(code, (rank, columns))
        layout[stored(name, "B")] = TensorSpec(code, (rows, rank))
    strengths, matrices = {}, {}
    with new_folder(output) as folder:
        with TensorWriter(folder, layout, stem=STEM, limit=sys.maxsize) as writer:
            for name, rank in ranks.items():
                strengths[name], matrices[name] = _write_matrix(total, name, rank, torch_dtype_of(code), writer)
        report = _report(total, matrices, cut, operation)
        for file, body in ((CONFIG, _config(total, ranks, strengths)), (REPORT, report)):
            (folder / file).write_text(json.dumps(body, indent=2, allow_nan=False) + "\n")
    return _shown(report)


def _rank(total: Sum, name: str, cut: Cut) -> int:
    parts = total.of(name)
    ranks = sum(site.rank for _, site, _ in parts)
    if cut.energy is not None:
        return rank_of_energy(product_svd(*total.update(name))[1], cut.energy)
    return ranks if cut.rank is None or cut.rank >= ranks else min(cut.rank, *parts[0][1].sides)


def _dtype(total: Sum, dtype: str | None) -> torch.dtype:
    """The one asked for; else the one that holds those of all factors."""
    if dtype is not None:
        return getattr(torch, dtype)
    found = {code for adapter, _ in total.parts for site in adapter.sites.values() for code in site.dtypes}
    widest, *others = map(torch_dtype_of, sorted(found))
    for other in others:
        widest = torch.promote_types(widest, other)
    return widest


def _write_matrix(
    total: Sum, name: str, rank: int, dtype: torch.dtype, writer: TensorWriter
) -> tuple[float, dict[str, Any]]:
    """Its strength, and what is to be said of it. The error is that of the factors as they are stored."""
    exact = total.update(name)
    if rank == exact[1].shape[0]:
        strength = total.unit(name)
        left, right = total.update(name, strength)
    else:
        strength = 1.0
        left, right = truncated(*exact, rank)
    lora_b, lora_a = left.to(dtype), right.to(dtype)
    if not bool(torch.isfinite(lora_b).all() and torch.isfinite(lora_a).all()):
        raise WeightError(f"{name}: the factors overflow {dtype_code(dtype)}; give --dtype float32")
    writer.write(stored(name, "A"), lora_a)
    writer.write(stored(name, "B"), lora_b)
    difference = torch.cat([lora_b.double() * strength, -exact[0]], dim=1), torch.cat([lora_a.double(), exact[1]])
    norm, error = product_norm(*exact), product_norm(*difference)
    said = {"rank": rank, "of": exact[1].shape[0], "norm": norm, "error": error, "relative_error": _share(error, norm)}
    return strength, said


def _config(total: Sum, ranks: Mapping[str, int], strengths: Mapping[str, float]) -> dict[str, Any]:
    """The first adapter's settings, with ranks and strengths of the result. What says where adapters are put is left
    where all are put alike."""
    first = total.parts[0][0]
    config = {key: value for key, value in first.config.items() if key not in _OVER}
    if ranks.keys() != first.sites.keys():
        config |= dict.fromkeys(_WHERE) | {"target_modules": sorted(ranks)}
    alphas = {name: strengths[name] * rank for name, rank in ranks.items()}
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks.values(), alphas.values()))
    return config | {
        "init_lora_weights": True,
        "use_rslora": False,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }


def _report(total: Sum, matrices: Mapping[str, dict[str, Any]], cut: Cut, operation: str) -> dict[str, Any]:
    norm, error = (math.hypot(*(row[key] for row in matrices.values())) for key in ("norm", "error"))
    return {
        "operation": operation,
        "inputs": [{"weight": weight, "sha256": adapter.identity()} for adapter, weight in total.parts],
        "rank": cut.rank,
        "energy": cut.energy,
        "norm": norm,
        "error": error,
        "relative_error": _share(error, norm),
        "approximate": _APPROXIMATE if operation == "subtract" and _begun_by_loftq(total) else None,
        "matrices": dict(matrices),
    }


def _begun_by_loftq(total: Sum) -> bool:
    return any(adapter.config.get("init_lora_weights") == "loftq" for adapter, _ in total.parts)


def _share(error: float, norm: float) -> float:
    return error / norm if norm else 0.0


def _shown(report: Mapping[str, Any]) -> str:
    rows = [
        (name, str(row["rank"]), str(row["of"]), f"{row['norm']:.4g}", f"{row['relative_error']:.2e}")
        for name, row in report["matrices"].items()
    ]
    rows.append(("all together", "", "", f"{report['norm']:.4g}", f"{report['relative_error']:.2e}"))
    table = render(("matrix", "rank", "of", "norm", "relative error"), rows)
    return table if report["approximate"] is None else f"{table}\n\n{report['approximate']}"

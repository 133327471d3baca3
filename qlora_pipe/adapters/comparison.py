"""Two adapters side by side: how large, how alike, and what they do to the singular vectors of their base."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pipe.adapters.base import Base
from qlora_pipe.adapters.folder import Adapter, read_adapter
from qlora_pipe.adapters.operations import check_sides
from qlora_pipe.errors import ConfigError, WeightError
from qlora_pipe.events import Reporter
from qlora_pipe.report.table import render
from quant.adapters import (
    Intruders,
    find_intruders,
    inner_product,
    left_vectors,
    product_norm,
    product_svd,
    subspace_overlap,
    subspaces,
)
from quant.exceptions import NonFiniteError

NARROW = 64
"""Outputs below which random directions are often no intruders, by chance."""

_SIDES = ("a", "b")


def compare(
    first: Path, second: Path, *, base: Path | None, top: int, threshold: float, file: Path | None, reporter: Reporter
) -> str:
    """What two adapters have in common, as text; also as JSON in `file`.

    Peak bytes: the factors of one matrix a few times, in float64; with a base, one dense matrix about six times in
    fp32, and the SVD of each matrix without and with each adapter. Raises SourceError, UnsupportedModel or WeightError
    as `read_adapter` and `Base`, ConfigError for a `top` or `threshold` out of range.
    """
    adapters = dict(zip(_SIDES, (read_adapter(first), read_adapter(second)), strict=True))
    check_sides(list(adapters.values()))
    if top < 1 or not 0 < threshold <= 1:
        raise ConfigError(
            f"expected --top of 1 at least and --threshold above 0, 1 at most, found {top} and {threshold}"
        )
    sites = {name: site.sides for adapter in adapters.values() for name, site in adapter.sites.items()}
    weights = None if base is None else Base(base)
    if weights is not None:
        for name, sides in sites.items():
            weights.check(name, sides)
    rows: dict[str, dict[str, Any]] = {}
    with reporter.progress("comparing", len(sites)) as advance:
        for name, sides in sites.items():
            rows[name] = _alike(adapters, name)
            if weights is not None:
                rows[name] |= {"spectral": _spectral(adapters, name, weights, sides, top, threshold)}
            advance()
    report = {
        "adapters": {side: {"base": adapter.base, "sha256": adapter.identity()} for side, adapter in adapters.items()},
        "all": _all(rows),
        "matrices": rows,
    }
    if weights is not None:
        report["spectral"] = {"base": "packed" if weights.packed else "dense", "top": top, "threshold": threshold}
    if file is not None:
        try:
            file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{file}: expected a path that can be written, found {error.strerror}") from error
    return _shown(report)


def _alike(adapters: Mapping[str, Adapter], name: str) -> dict[str, Any]:
    """Norms, and of a matrix that both adapt the inner product, cosine and overlaps; None where there is nothing."""
    updates = {side: adapter.update(name) for side, adapter in adapters.items() if name in adapter.sites}
    norms = {side: product_norm(*update) for side, update in updates.items()}
    row: dict[str, Any] = {"norm": {side: norms.get(side) for side in _SIDES}, "inner": 0.0}
    row |= {"cosine": None, "overlap": {"outputs": None, "inputs": None}}
    if len(updates) == 2:
        one, two = updates.values()
        row["inner"] = inner_product(one, two)
        row["cosine"] = _cosine(row["inner"], *norms.values())
        pairs = zip(subspaces(*one), subspaces(*two), strict=True)
        row["overlap"] = dict(zip(("outputs", "inputs"), (subspace_overlap(*pair) for pair in pairs), strict=True))
    return row


def _spectral(
    adapters: Mapping[str, Adapter], name: str, base: Base, sides: tuple[int, int], top: int, threshold: float
) -> dict[str, Any]:
    """By adapter, what it does to the singular vectors of one weight of the base."""
    weight = base.weight(name, sides)
    vectors, values = left_vectors(weight)
    found = {}
    for side, adapter in adapters.items():
        if name in adapter.sites:
            left, right = adapter.update(name)
            changed = weight.addmm(left.float(), right.float())
            try:
                intruders = find_intruders(vectors, changed, top=top, threshold=threshold)
            except NonFiniteError as error:
                raise WeightError(
                    f"{name}: the weight with what {adapter.folder} adds overflows float32; the adapter is of no use"
                ) from error
            found[side] = _said(intruders, float(product_svd(left, right)[1][0]), float(values[0]))
    return found


def _said(found: Intruders, update: float, weight: float) -> dict[str, Any]:
    """`margin` is the update's largest singular value over the weight's."""
    return {
        "intruders": found.count,
        "top": len(found.cosines),
        "energy": found.energy,
        "margin": update / weight if weight else None,
        "cosines": list(found.cosines),
    }


def _cosine(inner: float, one: float, two: float) -> float | None:
    return inner / (one * two) if one and two else None


def _all(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All matrices as one vector; overlaps on average over those that both adapt."""
    norm = {side: math.hypot(*(row["norm"][side] or 0.0 for row in rows.values())) for side in _SIDES}
    overlap = {}
    for end in ("outputs", "inputs"):
        found = [row["overlap"][end] for row in rows.values() if row["overlap"][end] is not None]
        overlap[end] = sum(found) / len(found) if found else None
    inner = math.fsum(row["inner"] for row in rows.values())
    return {"norm": norm, "inner": inner, "cosine": _cosine(inner, *norm.values()), "overlap": overlap}


def _shown(report: Mapping[str, Any]) -> str:
    rows = report["matrices"] | {"all together": report["all"]}
    head = ("matrix", "norm a", "norm b", "cosine", "overlap outputs", "overlap inputs")
    parts = [
        render(
            head,
            [
                (name, *(_figure(value) for value in (*row["norm"].values(), row["cosine"], *row["overlap"].values())))
                for name, row in rows.items()
            ],
        )
    ]
    bases = dict.fromkeys(str(said["base"]) for said in report["adapters"].values())
    if len(bases) > 1:
        parts.append(f"They say that they are of different models: {' and '.join(bases)}.")
    if "spectral" in report:
        parts += _spectral_parts(report)
    return "\n\n".join(parts)


def _spectral_parts(report: Mapping[str, Any]) -> list[str]:
    asked, found = report["spectral"], {name: row["spectral"] for name, row in report["matrices"].items()}
    head = ("matrix", *(f"{what} {side}" for side in _SIDES for what in ("intruders", "energy", "margin")))
    rows = [(name, *(cell for side in _SIDES for cell in _cells(sides.get(side)))) for name, sides in found.items()]
    total = {side: [row[side] for row in found.values() if side in row] for side in _SIDES}
    counts = [
        f"{sum(row['intruders'] for row in rows)} of {sum(row['top'] for row in rows)}" for rows in total.values()
    ]
    rows.append(("all together", counts[0], "", "", counts[1], "", ""))
    said = (
        f"Intruders: leading left singular vectors of the {asked['base']} weight with the adapter, {asked['top']} a "
        f"matrix, without a cosine of {asked['threshold']:g} with any of the weight's own. Below {NARROW} outputs a "
        "count says little."
    )
    return [render(head, rows), said]


def _cells(said: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if said is None:
        return "-", "-", "-"
    return f"{said['intruders']} of {said['top']}", f"{100 * said['energy']:.1f} %", _figure(said["margin"])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

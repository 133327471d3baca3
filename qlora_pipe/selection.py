"""Between scores, the solver and the artifact of `select`: what each width costs, what is taken, and its re-check.

kept.json says which groups stay; scores.json and table.json why; selection.json how much goes, and that it is best.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune.counting import exact_ratio
from prune.groups import LayerShape
from prune.indexmap import IndexMap
from prune.select import check_scores, keep_best, removal_losses
from qlora_pipe.architectures import Architecture
from qlora_pipe.artifacts.manifest import Manifest
from qlora_pipe.config import Prune
from qlora_pipe.errors import ArtifactError
from qlora_pipe.widths import (
    KINDS,
    bias_parameters,
    group_sizes,
    offered,
    parameters_to_go,
    prunable,
    reduction,
    small_architecture,
)
from solver import CertificateError, Item, Problem, Solution, check, solve
from solver import Choice as Option

Scores = Sequence[Mapping[str, Tensor]]
"""Scores of every layer's groups by kind; empty for layers that are protected."""

Table = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a layer's kind of groups to rows: `width`, the groups left; `parameters` they have; `loss` of what goes."""

Measured = Mapping[str, float]
"""Name, as in a table, to how far predictions move (nats a token) with the least of it that may stay."""

Counts = list[tuple[int, int]]
"""KV groups and FFN channels that stay of every layer."""


def probes(scores: Scores, architecture: Architecture, settings: Prune) -> Iterator[tuple[str, int, str, IndexMap]]:
    """(name in the table, layer, kind, what stays) of every kind of groups in turn at the least width it may have, its
    layer otherwise whole; not where it may only stay as it is. Raises PruneError as `tabulate`."""
    for layer in prunable(architecture, settings):
        shape = architecture.layers[layer]
        check_scores(scores[layer], shape, layer)
        for kind in KINDS:
            least = offered(shape, kind, settings)[0]
            if least < shape.group_count(kind):
                counts = (least, shape.ffn) if kind == "kv" else (shape.kv_heads, least)
                yield _name(layer, kind), layer, kind, keep_best([scores[layer]], [shape], [counts])


def tabulate(
    scores: Scores, architecture: Architecture, settings: Prune, measured: Measured | None = None
) -> dict[str, list[dict[str, Any]]]:
    """What each width would cost, for every layer that is not protected, in the order of the model.

    A loss is the sum of the scores of the groups that go, in proportion to what was `measured` without all of them
    that may. Raises PruneError, naming layer and kind, where a score is missing, misshapen or not finite.
    """
    free = prunable(architecture, settings)
    rows: dict[str, list[dict[str, Any]]] = {}
    for layer in free:
        shape, sizes = architecture.layers[layer], group_sizes(architecture, layer)
        check_scores(scores[layer], shape, layer)
        for kind in KINDS:
            rows[_name(layer, kind)] = [
                {"width": width, "parameters": width * sizes[kind]} for width in offered(shape, kind, settings)
            ]
    losses = _losses(scores, rows, density=settings.compares_scores and settings.method == "flap", measured=measured)
    for name, entries in rows.items():
        for row, loss in zip(entries, losses[name], strict=True):
            row["loss"] = loss
    return rows


def decide(table: Table, architecture: Architecture, settings: Prune) -> tuple[Counts, Solution | None]:
    """What stays of every layer, and where the solver chose, its solution, checked."""
    even = [(shape.kv_heads, shape.ffn) for shape in small_architecture(architecture, settings).layers]
    if settings.widths == "uniform" or not settings.removes:
        return even, None
    problem = pose(table, parameters_to_go(architecture, settings))
    # Some widths fit: the plan has made sure of it.
    solution = solve(problem, time_limit=settings.time_limit)
    check(problem, solution)
    chosen = {name: int(width) for name, width in solution.selection.items()}
    for layer in prunable(architecture, settings):
        kv_heads, ffn = (chosen[_name(layer, kind)] for kind in KINDS)
        even[layer] = (kv_heads, ffn)
    return even, solution


def pose(table: Table, to_go: int) -> Problem:
    """What the solver is asked: at least so many parameters go, at the least total loss."""
    items = [
        Item(name, tuple(Option(str(row["width"]), row["parameters"], row["loss"]) for row in rows))
        for name, rows in table.items()
    ]
    return Problem(sum(rows[-1]["parameters"] for rows in table.values()) - to_go, tuple(items))


def record(
    table: Table,
    kept: IndexMap,
    solution: Solution | None,
    architecture: Architecture,
    settings: Prune,
    model: str,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """The body of selection.json. Reductions are shares of the blocks' parameters, `nominal` of the groups in layers
    that are not protected; `loss` and `loss_uniform` are sums over the table, the latter of the even widths.
    """
    layers = kept.kept_shapes
    even = small_architecture(architecture, settings)
    full, added = architecture.block_parameters(), bias_parameters(architecture, settings)
    small = even.with_layers(layers).block_parameters() + added
    return {
        "method": settings.method,
        "widths": settings.widths,
        "losses": settings.losses,
        "measured": measured,
        "ratio": settings.ratio,
        "model": model,
        "index_map": kept.digest(),
        "parameters": {"blocks": full, "kept": small, "biases": added},
        "true_reduction": reduction(full, small),
        "nominal": _nominal(layers, architecture.layers, prunable(architecture, settings)),
        "uniform": {name: _width(name, even.layers) for name in table},
        "loss": _total(table, layers),
        "loss_uniform": _total(table, even.layers),
        "certificate": None
        if solution is None
        else {
            "to_go": parameters_to_go(architecture, settings),
            "cost": solution.cost,
            "loss": solution.loss,
            "bound": solution.bound,
            "gap": solution.gap,
            "multiplier": solution.multiplier,
            "optimal": solution.optimal,
            "method": solution.method,
        },
    }


def scores_to_json(scores: Scores) -> list[dict[str, list[float]]]:
    """Scores for scores.json, all digits of them."""
    return [{kind: values.double().tolist() for kind, values in layer.items()} for layer in scores]


def read_index_map(folder: Path, source: Manifest, shapes: Sequence[LayerShape]) -> IndexMap:
    """The index map that `select` left in its folder; ArtifactError if it is not of this model, or malformed."""
    again = "run the stage select again"
    path = folder / "kept.json"
    try:
        kept, body = IndexMap.from_json(_read(path)), _read(folder / "selection.json")
        wanted, found = source.inputs["model"], body["model"]
        digest = body["index_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected the index map of a selection, found {error!r}; {again}") from error
    if found != wanted:
        raise ArtifactError(
            f"{path}: the index map was selected for the model {found}, but this run has the model {wanted}; {again}"
        )
    if digest != kept.digest():
        raise ArtifactError(
            f"{path}: selection.json is about the index map {digest}, but this one is {kept.digest()}; {again}"
        )
    if kept.original != tuple(shapes):
        raise ArtifactError(f"{path}: the index map is of layers of other widths than this model's; {again}")
    return kept


def recheck(
    scores: Sequence[Mapping[str, Sequence[float]]], table: Table, body: Mapping[str, Any], kept: IndexMap
) -> None:
    """Re-derive what selection.json states: losses from scores, the best groups, totals, and the solver's certificate.

    Raises CertificateError naming the first statement that is not true, SolverError, or KeyError, TypeError or
    ValueError where something is missing or malformed.
    """
    values = [{kind: torch.tensor(each, dtype=torch.float64) for kind, each in layer.items()} for layer in scores]
    density = (body["method"], body["widths"], body["losses"]) == ("flap", "allocated", "scores")
    for name, losses in _losses(values, table, density=density, measured=body["measured"]).items():
        if losses != [row["loss"] for row in table[name]]:
            raise CertificateError(
                f"table.json: the losses of {name} do not follow from scores.json, and selection.json's `measured`"
            )
    layers = kept.kept_shapes
    if keep_best(values, kept.original, [(shape.kv_heads, shape.ffn) for shape in layers]) != kept:
        raise CertificateError("kept.json does not keep the groups of the highest scores")
    gone = sum(rows[-1]["parameters"] - _row(rows, width)["parameters"] for rows, width in _taken(table, layers))
    full, small, added = (body["parameters"][key] for key in ("blocks", "kept", "biases"))
    stated = {"gone": full - small + added, "true_reduction": body["true_reduction"], "loss": body["loss"]}
    found = {"gone": gone, "true_reduction": reduction(full, small), "loss": _total(table, layers)}
    for key, value in found.items():
        if stated[key] != value:
            raise CertificateError(f"{key} does not follow from the table: expected {value}, found {stated[key]}")
    _recheck_request(body, table, kept, layers)
    proof = body["certificate"]
    if proof is None:
        return
    selection = {name: str(_width(name, layers)) for name in table}
    stated = {key: proof[key] for key in ("cost", "loss", "bound", "gap", "multiplier", "optimal", "method")}
    check(pose(table, proof["to_go"]), Solution(selection=selection, seconds=0.0, **stated))


def _recheck_request(body: Mapping[str, Any], table: Table, kept: IndexMap, layers: Sequence[LayerShape]) -> None:
    """What was asked for is what went at least, and the figures that go with it follow."""
    full, small = body["parameters"]["blocks"], body["parameters"]["kept"]
    to_go = math.ceil(exact_ratio(body["ratio"] or 0.0) * full)
    uniform = math.fsum(_row(rows, body["uniform"][name])["loss"] for name, rows in table.items())
    free = sorted({_place(name)[0] for name in table})
    found = {"nominal": _nominal(layers, kept.original, free), "loss_uniform": uniform}
    for key, value in found.items():
        if body[key] != value:
            raise CertificateError(f"{key} does not follow from the table: expected {value}, found {body[key]}")
    if full - small < to_go:
        raise CertificateError(f"{full - small} parameters went, ratio {body['ratio']} asks for {to_go}")
    if body["certificate"] is not None and body["certificate"]["to_go"] != to_go + body["parameters"]["biases"]:
        raise CertificateError(f"to_go is not what ratio asks for: expected {to_go}")


def _losses(scores: Scores, table: Table, *, density: bool, measured: Measured | None) -> dict[str, list[float]]:
    """Losses of the table's rows. FLAP's standardised scores say what a parameter is worth rather than a group: such a
    density counts from the lowest of all, so that none is negative, and times the parameters of a group: about as many
    go whatever is chosen, so that the starting point decides nothing.
    """
    places = {name: _place(name) for name in table}
    lowest = min((float(scores[layer][kind].min()) for layer, kind in places.values()), default=0.0)
    found = {}
    for name, (layer, kind) in places.items():
        rows, values = table[name], scores[layer][kind].double()
        if density:
            values = (values - lowest) * (rows[-1]["parameters"] // rows[-1]["width"])
        losses = removal_losses(values, [row["width"] for row in rows])
        if measured is not None:
            # Where no group has a score they share what was measured alike.
            parts = losses if losses[0] else [float(rows[-1]["width"] - row["width"]) for row in rows]
            losses = [measured[name] * (part / parts[0]) if parts[0] else 0.0 for part in parts]
        found[name] = losses
    return found


def _total(table: Table, layers: Sequence[LayerShape]) -> float:
    return math.fsum(_row(rows, width)["loss"] for rows, width in _taken(table, layers))


def _taken(table: Table, layers: Sequence[LayerShape]) -> list[tuple[Sequence[Mapping[str, Any]], int]]:
    """Rows of every item, and the width that was taken."""
    return [(rows, _width(name, layers)) for name, rows in table.items()]


def _row(rows: Sequence[Mapping[str, Any]], width: int) -> Mapping[str, Any]:
    for row in rows:
        if row["width"] == width:
            return row
    raise CertificateError(f"table.json has no row of the width {width} that was taken")


def _width(name: str, layers: Sequence[LayerShape]) -> int:
    layer, kind = _place(name)
    return layers[layer].group_count(kind)


def _nominal(layers: Sequence[LayerShape], original: Sequence[LayerShape], free: Iterable[int]) -> dict[str, float]:
    """Share of the groups that has gone from layers that are not protected, by kind."""
    found = {}
    for kind in KINDS:
        whole = sum(original[layer].group_count(kind) for layer in free)
        left = sum(layers[layer].group_count(kind) for layer in free)
        found[kind] = 1 - left / whole if whole else 0.0
    return found


def _name(layer: int, kind: str) -> str:
    return f"layers.{layer}.{kind}"


def _place(name: str) -> tuple[int, str]:
    _, layer, kind = name.split(".")
    return int(layer), kind


def _read(path: Path) -> Any:
    return json.loads(path.read_text())

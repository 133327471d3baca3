"""Tables of widths, what is decided on them, and the record of it: against brute force and float64 sums."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import LayerShape
from prune.indexmap import IndexMap
from prune.select import keep_best
from qlora_pipe.architectures import FAMILIES, Architecture
from qlora_pipe.config import Prune
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.selection import decide, pose, probes, read_index_map, recheck, record, scores_to_json, tabulate
from qlora_pipe.widths import parameters_to_go, small_architecture
from solver import CertificateError, SolverError

SHAPE = LayerShape(hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=12)
MODEL = "0" * 64


def architecture(layers: int, shape: LayerShape = SHAPE) -> Architecture:
    return Architecture("llama", FAMILIES[0], 10, (shape,) * layers, True, frozenset())


def options(**values: Any) -> Prune:
    return Prune.model_validate({"align": 4, "ratio": 0.3, "widths": "allocated", "losses": "scores", **values})


def scores_of(model: Architecture, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            kind: torch.rand(shape.group_count(kind), generator=generator, dtype=torch.float64) * (1 + 5 * layer)
            for kind in ("kv", "ffn")
        }
        for layer, shape in enumerate(model.layers)
    ]


def measured_of(model: Architecture, prune: Prune, seed: int = 0) -> dict[str, float] | None:
    names = [name for name, *_ in probes(scores_of(model, seed), model, prune)]
    return {name: 0.1 + number * 7 % 5 for number, name in enumerate(names)} if prune.measures else None


def selected(model: Architecture, prune: Prune, seed: int = 0) -> tuple[Any, Any, dict[str, Any], IndexMap]:
    """(scores, table, body, kept) as they come back from files."""
    scores, measured = scores_of(model, seed), measured_of(model, prune, seed)
    table = tabulate(scores, model, prune, measured)
    counts, solution = decide(table, model, prune)
    kept = keep_best(scores, model.layers, counts)
    body = record(table, kept, solution, model, prune, MODEL, measured)
    return (*json.loads(json.dumps([scores_to_json(scores), table, body])), kept)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    ratio=st.sampled_from([0.0, 0.05, 0.2, 0.35, 0.5]),
    protect=st.sampled_from([(0, 0), (1, 0), (0, 1)]),
    method=st.sampled_from(["activation", "flap"]),
    losses=st.sampled_from(["scores", "measured"]),
    bias=st.booleans(),
)
def test_allocated_is_the_best_of_all_and_never_worse_than_uniform(
    seed: int, ratio: float, protect: tuple[int, int], method: str, losses: str, bias: bool
) -> None:
    model = architecture(3)
    protected = {"protect_first": protect[0], "protect_last": protect[1]}
    prune = options(ratio=ratio, method=method, losses=losses, bias=bias, **protected)
    try:
        even = small_architecture(model, prune)
    except ConfigError:
        return
    scores, table, body, kept = selected(model, prune, seed)
    recheck(scores, table, body, kept)
    whole = sum(rows[-1]["parameters"] for rows in table.values())
    most = whole - parameters_to_go(model, prune)
    fitting = [
        math.fsum(row["loss"] for row in rows)
        for rows in itertools.product(*table.values())
        if sum(row["parameters"] for row in rows) <= most
    ]
    assert body["loss"] == pytest.approx(min(fitting), rel=1e-12)
    assert body["loss"] <= body["loss_uniform"] * (1 + 1e-12)
    assert body["true_reduction"] >= ratio
    layers = tuple(kept.kept_shape(layer) for layer in range(3))
    kept_parameters = model.with_layers(layers).block_parameters()
    # One bias of o and one of down in every layer, where something goes.
    biases = 3 * 2 * 8 if bias and ratio else 0
    full = model.block_parameters()
    assert body["parameters"] == {"blocks": full, "kept": kept_parameters + biases, "biases": biases}
    for layer, (shape, full) in enumerate(zip(layers, model.layers, strict=True)):
        if layer < protect[0] or layer >= 3 - protect[1]:
            assert shape == full
        assert shape.kv_heads >= 1
        assert shape.ffn % 4 == 0
    if ratio == 0:
        assert kept == IndexMap.identity(model.layers)
        assert even.layers == model.layers
        assert body["certificate"] is None


@pytest.mark.parametrize("method", ["activation", "wanda", "taylor", "flap"])
def test_losses_are_sums_of_the_scores_that_go(method: str) -> None:
    model, prune = architecture(2), options(method=method)
    scores = scores_of(model)
    scores[0]["ffn"] -= 0.5
    table = tabulate(scores, model, prune)
    assert list(table) == ["layers.0.kv", "layers.0.ffn", "layers.1.kv", "layers.1.ffn"]
    lowest = min(float(values.min()) for layer in scores for values in layer.values())
    for name, rows in table.items():
        _, layer, kind = name.split(".")
        values = sorted(scores[int(layer)][kind].tolist())
        size = {"kv": 8 * 2 * (2 + 1 + 1 + 2), "ffn": 3 * 8}[kind]
        assert [row["width"] for row in rows] == ([1, 2] if kind == "kv" else [4, 8, 12])
        for row in rows:
            assert row["parameters"] == row["width"] * size
            gone = values[: len(values) - row["width"]]
            expected = sum((value - lowest) * size for value in gone) if method == "flap" else sum(gone)
            assert row["loss"] == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert rows[-1]["loss"] == 0


@pytest.mark.parametrize("method", ["flap", "random"])
def test_measured_losses_are_shared_out_by_scores(method: str) -> None:
    """The least width has the loss that was measured, and any other the share of it that its scores have."""
    model, prune = architecture(2), options(method=method, losses="measured")
    scores, measured = scores_of(model), measured_of(model, prune)
    assert measured is not None
    assert list(measured) == ["layers.0.kv", "layers.0.ffn", "layers.1.kv", "layers.1.ffn"]
    for name, rows in tabulate(scores, model, prune, measured).items():
        _, layer, kind = name.split(".")
        values = sorted(scores[int(layer)][kind].tolist())
        most = math.fsum(values[: len(values) - rows[0]["width"]])
        for row in rows:
            share = math.fsum(values[: len(values) - row["width"]]) / most
            assert row["loss"] == pytest.approx(measured[name] * share, rel=1e-12, abs=1e-12)
        assert (rows[0]["loss"], rows[-1]["loss"]) == (measured[name], 0)
    nothing = [{kind: torch.zeros_like(values) for kind, values in layer.items()} for layer in scores]
    # Without a score to tell them apart the groups share it alike: what was measured does not vanish.
    for name, rows in tabulate(nothing, model, prune, measured).items():
        most = rows[-1]["width"] - rows[0]["width"]
        for row in rows:
            share = (rows[-1]["width"] - row["width"]) / most
            assert row["loss"] == pytest.approx(measured[name] * share, rel=1e-12, abs=1e-12)


def test_every_kind_is_probed_alone_at_its_least_width() -> None:
    model, prune = architecture(3), options(losses="measured", protect_first=1)
    scores = scores_of(model)
    found = {name: (layer, kind, kept) for name, layer, kind, kept in probes(scores, model, prune)}
    assert list(found) == ["layers.1.kv", "layers.1.ffn", "layers.2.kv", "layers.2.ffn"]
    for layer, kind, kept in found.values():
        shape, best = kept.kept_shape(0), scores[layer][kind].argsort(descending=True)
        assert (shape.kv_heads, shape.ffn) == ((1, 12) if kind == "kv" else (2, 4))
        stay = kept.layers[0].kv_heads if kind == "kv" else kept.layers[0].ffn
        assert sorted(stay) == sorted(best[: len(stay)].tolist())
    alone = architecture(1, LayerShape(hidden=8, heads=2, kv_heads=1, head_dim=2, ffn=4))
    assert list(probes(scores_of(alone), alone, prune.model_copy(update={"protect_first": 0}))) == []


def test_what_may_stay_is_all_but_what_has_to_go() -> None:
    model, prune = architecture(2), options()
    table = tabulate(scores_of(model), model, prune)
    whole = 2 * (2 * 8 * 12 + 12 * 24)
    for to_go in (0, 1, 191, 192, 193):
        assert pose(table, to_go).budget == whole - to_go


def test_flap_takes_groups_below_one_threshold() -> None:
    """What a parameter is worth decides, whatever the layer: no group stays that is worth less than one that goes."""
    shape = LayerShape(hidden=8, heads=1, kv_heads=1, head_dim=2, ffn=12)
    model = architecture(3, shape)
    prune = options(method="flap", align=1, ratio=0.3)
    scores = [{kind: values - 2 for kind, values in layer.items()} for layer in scores_of(model)]
    counts, _ = decide(tabulate(scores, model, prune), model, prune)
    kept = keep_best(scores, model.layers, counts)
    stay = [float(scores[i]["ffn"][j]) for i in range(3) for j in kept.layers[i].ffn if len(kept.layers[i].ffn) > 1]
    gone = [float(scores[i]["ffn"][j]) for i in range(3) for j in set(range(12)) - set(kept.layers[i].ffn)]
    assert gone
    assert min(stay) > max(gone)


@pytest.mark.parametrize("widths", ["uniform", "allocated"])
@pytest.mark.parametrize("losses", ["scores", "measured"])
def test_the_same_scores_give_the_same_record(widths: str, losses: str) -> None:
    model, prune = architecture(3), options(widths=widths, losses=losses)
    first, second = selected(model, prune), selected(model, prune)
    assert first == second
    recheck(*first)


def edited(body: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return body | {"certificate": body["certificate"] | {key: value}}


def test_what_does_not_follow_is_found() -> None:
    scores, table, body, kept = selected(architecture(3), options())
    recheck(scores, table, body, kept)
    proof = body["certificate"]
    assert proof["optimal"]
    for key, value in (("loss", proof["loss"] / 2), ("cost", proof["cost"] + 1), ("bound", proof["bound"] * 2)):
        with pytest.raises(SolverError):
            recheck(scores, table, edited(body, key, value), kept)
    for wrong, message in (
        (edited(body, "to_go", proof["to_go"] + 1), "to_go is not what ratio asks for"),
        (body | {"ratio": 0.9}, "parameters went, ratio 0.9 asks for"),
        (body | {"loss_uniform": 1e9}, "loss_uniform does not follow"),
        (body | {"nominal": {"kv": 0.9, "ffn": 0.9}}, "nominal does not follow"),
        (body | {"uniform": dict.fromkeys(table, 7)}, "no row of the width 7"),
    ):
        with pytest.raises(CertificateError, match=message):
            recheck(scores, table, wrong, kept)
    with pytest.raises(CertificateError, match="loss does not follow"):
        recheck(scores, table, body | {"loss": body["loss"] + 1}, kept)
    worse = [{kind: values[::-1] for kind, values in layer.items()} for layer in scores]
    with pytest.raises(CertificateError, match="does not keep the groups of the highest scores"):
        recheck(worse, table, body, kept)
    shifted = [{kind: [value + 1 for value in values] for kind, values in layer.items()} for layer in scores]
    with pytest.raises(CertificateError, match=r"the losses of layers\.0\.kv do not follow"):
        recheck(shifted, table, body, kept)
    scores, table, body, kept = selected(architecture(3), options(losses="measured"))
    recheck(scores, table, body, kept)
    wrong = body | {"measured": body["measured"] | {"layers.1.ffn": body["measured"]["layers.1.ffn"] / 2}}
    with pytest.raises(CertificateError, match=r"the losses of layers\.1\.ffn do not follow from scores.json, and sel"):
        recheck(scores, table, wrong, kept)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["kv", "ffn"])
def test_scores_that_are_not_finite_name_layer_and_kind(value: float, kind: str) -> None:
    model = architecture(3)
    scores = scores_of(model)
    scores[1][kind][0] = value
    with pytest.raises(PruneError, match=f"layer 1: {kind} scores contain NaN or infinity"):
        tabulate(scores, model, options())
    # Protected, they are not read.
    tabulate([{}, {}, scores[2]], model, options(protect_first=2, ratio=0.1))


def test_an_index_map_of_another_model_is_refused_with_both_hashes(tmp_path: Path) -> None:
    model = architecture(2)
    _, _, body, kept = selected(model, options())
    (tmp_path / "kept.json").write_text(json.dumps(kept.to_json()))
    source: Any = SimpleNamespace(inputs={"model": MODEL})

    def read(shapes: tuple[LayerShape, ...] = model.layers, **changes: Any) -> IndexMap:
        (tmp_path / "selection.json").write_text(json.dumps(body | changes))
        return read_index_map(tmp_path, source, shapes)

    assert read() == kept
    with pytest.raises(ArtifactError, match=r"selected for the model 1{64}, but this run has the model 0{64}"):
        read(model="1" * 64)
    with pytest.raises(ArtifactError, match=f"about the index map 2222, but this one is {kept.digest()}"):
        read(index_map="2222")
    with pytest.raises(ArtifactError, match="other widths than this model's"):
        read(architecture(3).layers)
    (tmp_path / "kept.json").write_text("{")
    with pytest.raises(ArtifactError, match="expected the index map of a selection"):
        read()

"""The select stage on a tiny model: every method, both kinds of widths, the identity, and the very same bytes again."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_settings, save_texts, save_tiny_model

from prune.flap import mean_bias
from prune.indexmap import IndexMap
from prune.saliency import activation
from prune.slice import slice_rows_or_columns
from qlora_pipe import datasets
from qlora_pipe.allocation import read_allocation
from qlora_pipe.architectures import linear_name
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.model import build, dense_linear, load_config
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.plan import know
from qlora_pipe.selection import probes
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import packed_map
from qlora_pipe.stages.select import run as run_select
from qlora_pipe.verify import verify_path

MOMENTS = ("activation", "wanda", "flap", "taylor")
ALLOCATED = ("prune.ratio=0.2", "prune.widths=allocated", "export.small=false")
BY_SCORES = (*ALLOCATED, "prune.losses=scores")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to refine; other settings of prune go on from there."""
    folder = tmp_path_factory.mktemp("select")
    save_tiny_model(folder / "model", num_hidden_layers=3)
    save_texts(folder)
    save_settings(folder)
    pruned(folder)
    return folder


def pruned(folder: Path, *overrides: str) -> dict[str, Any]:
    """selection.json of a verified run."""
    reporter = Reporter(json_lines=True, stream=io.StringIO())
    compile_model(load(folder / "tiny.yaml", overrides), reporter, until="prune")
    assert [line.split()[0] for line in verify_path(folder / "run")][-2:] == ["select", "prune"]
    return body_of(folder, "selection.json")


def body_of(folder: Path, name: str) -> Any:
    return json.loads((folder / "run/select" / name).read_text())


def kept_of(folder: Path) -> IndexMap:
    return IndexMap.from_json(body_of(folder, "kept.json"))


def test_lorams_own_counts_go_through(folder: Path) -> None:
    """Widths that are no multiple of `align`, layers protected; and the preset is what it stands for."""
    counts = ("prune.kv_ratio=0.3", "prune.ffn_ratio=0.3", "export.small=false", "compact.enabled=false")
    same = ("prune.rounding=loram", "prune.protect_first=1", "prune.protect_last=1")
    body = pruned(folder, *counts, "prune.preset=loram", *same)
    shapes = [kept_of(folder).kept_shape(layer) for layer in range(3)]
    assert [(shape.kv_heads, shape.ffn) for shape in shapes] == [(2, 192), (2, 134), (2, 192)]
    assert body["uniform"] == {"layers.1.kv": 2, "layers.1.ffn": 134}
    identity = read_manifest(folder / "run/select").identity
    pruned(folder, *counts, *same)
    assert read_manifest(folder / "run/select").identity == identity


def hashes(folder: Path) -> dict[str, str]:
    files = {stage: read_manifest(folder / "run" / stage).files for stage in ("select", "prune")}
    return {f"{stage}/{name}": entry.sha256 for stage, found in files.items() for name, entry in found.items()}


@pytest.mark.parametrize("method", [*MOMENTS, "magnitude", "random"])
def test_every_method_ranks_by_its_own(folder: Path, method: str) -> None:
    body = pruned(folder, f"prune.method={method}", "prune.ratio=0.3")
    assert body["true_reduction"] >= 0.3
    assert body["certificate"] is None
    assert len({kept_of(folder).kept_shape(layer) for layer in range(3)}) == 1
    others = [pruned(folder, f"prune.method={other}", "prune.ratio=0.3")["index_map"] for other in MOMENTS]
    assert (body["index_map"] in others) == (method in MOMENTS)
    assert len(set(others)) == len(MOMENTS)


@pytest.mark.parametrize(
    ("method", "losses"),
    [*((method, "scores") for method in MOMENTS), ("flap", "measured"), ("magnitude", "measured")],
)
def test_allocated_widths_are_planned_exactly_and_no_worse_than_uniform(folder: Path, method: str, losses: str) -> None:
    overrides = (f"prune.method={method}", f"prune.losses={losses}", *ALLOCATED)
    body = pruned(folder, *overrides)
    assert 0.2 <= body["true_reduction"] < 0.25
    assert body["loss"] <= body["loss_uniform"]
    assert body["certificate"]["optimal"]
    kept, plan = kept_of(folder), json.loads((folder / "run/plan.json").read_text())
    assert plan["exact"]
    for row in plan["stages"]:
        if row["name"] in ("select", "prune"):
            written = read_manifest(folder / "run" / row["name"]).files
            assert row["files"] == {name: e.bytes for name, e in written.items() if name.endswith(".safetensors")}
    reader = TensorReader(folder / "run/prune")
    for layer in range(3):
        name = f"{linear_name(layer, 'down')}.codes"
        assert reader.locations[name].spec.shape[0] == kept.kept_shape(layer).ffn
        assert kept.kept_shape(layer).ffn % 32 == 0
    first = hashes(folder)
    compile_model(
        load(folder / "tiny.yaml", overrides),
        Reporter(json_lines=True, stream=io.StringIO()),
        until="prune",
        start="select",
    )
    assert hashes(folder) == first


@pytest.mark.parametrize("widths", ["uniform", "allocated"])
def test_ratio_zero_changes_nothing(folder: Path, widths: str) -> None:
    body = pruned(folder, "prune.ratio=0", f"prune.widths={widths}")
    assert (body["true_reduction"], body["loss"], set(body["nominal"].values())) == (0.0, 0.0, {0.0})
    assert body["parameters"]["blocks"] == body["parameters"]["kept"]
    assert kept_of(folder) == IndexMap.identity(kept_of(folder).original)
    context = context_of(folder, "prune.ratio=0", f"prune.widths={widths}")
    for layer, role, _ in context.known.architecture.linears():
        full, small = (
            packed_map(context, context.reader(stage), stage, layer, role).dequantized()
            for stage in ("decompose", "prune")
        )
        assert torch.equal(full, small)


def context_of(folder: Path, *overrides: str) -> Context:
    config = load(folder / "tiny.yaml", overrides)
    reporter = Reporter(json_lines=True, stream=io.StringIO())
    artifacts = compile_model(config, reporter, until="prune")
    body = json.loads((artifacts["allocate"].folder / "allocation.json").read_text())
    known = know(config, folder / "model").with_allocation(read_allocation(body))
    kept = kept_of(folder)
    known = known.with_kept(kept.kept_shapes)
    return Context(config, known, folder / "model", artifacts, folder / "out", folder / "work", reporter)


@pytest.mark.parametrize("bias", [False, True])
def test_measured_losses_are_those_of_a_model_that_is_cut_down(folder: Path, bias: bool) -> None:
    """Against the sliced weights in float64, one layer and kind at a time; ranks are those of uniform widths."""
    overrides = (*ALLOCATED, "prune.tokens=130", f"prune.bias={str(bias).lower()}")
    measured = pruned(folder, *overrides)["measured"]
    context, table = context_of(folder, *overrides), body_of(folder, "table.json")
    scores = [
        {kind: torch.tensor(each, dtype=torch.float64) for kind, each in layer.items()}
        for layer in body_of(folder, "scores.json")
    ]
    calibration = load(folder / "tiny.yaml", ()).data.calibration
    records, tokenizer = datasets.load(calibration, "train", 0), load_tokenizer(folder / "model")
    ids = [row.input_ids for row in rows(tokenizer, records, length=64, count=2, name="text")]

    def chances(layer: int = 0, kept: IndexMap | None = None) -> torch.Tensor:
        known, reader = context.known, context.reader("decompose")

        def linear(number: int, role: str, name: str) -> torch.nn.Module:
            weight, left = packed_map(context, reader, "decompose", number, role).dequantized(), None
            if kept is not None and number == layer:
                indices = kept.kept_indices(0, role)
                if bias and role in ("o", "down"):
                    mean = context.reader("calibrate", "moments").read(f"{name}.mean")
                    left = mean_bias(role, weight, mean, indices, known.architecture.layers[layer])
                weight = slice_rows_or_columns(weight, role, indices)
            return dense_linear(weight, left)

        config = load_config(folder / "model")
        model = build(config, known.architecture, linear, reader.read_float, device="cpu").double()
        with torch.no_grad():
            return model(torch.tensor(ids)).logits[:, :-1].log_softmax(dim=-1)

    whole = chances()
    for name, layer, _, kept in probes(scores, context.known.architecture, context.config.prune):
        expected = float((whole.exp() * (whole - chances(layer, kept))).sum(dim=-1).mean())
        assert measured[name] == pytest.approx(expected, rel=1e-4)
        assert table[name][0]["loss"] == measured[name]
    assert min(measured.values()) > 0.01
    pruned(folder, "prune.ratio=0.2", "export.small=false")
    assert body_of(folder, "scores.json") == [{k: v.tolist() for k, v in layer.items()} for layer in scores]


def test_scores_compare_across_layers_by_the_gradients_of_outputs(folder: Path) -> None:
    pruned(folder, *BY_SCORES)
    context, scores = context_of(folder, *BY_SCORES), body_of(folder, "scores.json")
    moments = context.reader("calibrate", "moments")
    for layer, shape in enumerate(context.known.architecture.layers):
        for kind, role in (("kv", "o"), ("ffn", "down")):
            name = linear_name(layer, role)
            weight = packed_map(context, context.reader("decompose"), "decompose", layer, role).dequantized().double()
            scaled = weight * moments.read(f"{name}.gradient").double().sqrt()[:, None]
            expected = activation(role, scaled, moments.read(f"{name}.input"), shape)
            assert scores[layer][kind] == pytest.approx(expected.tolist(), rel=1e-9)


def test_protected_layers_are_whole_and_not_scored(folder: Path) -> None:
    for method in ("random", "taylor"):
        pruned(folder, f"prune.method={method}", "prune.protect_first=1", "export.small=false")
        kept = kept_of(folder)
        assert kept.kept_shape(0) == kept.original[0]
        assert kept.kept_shape(1) == kept.kept_shape(2) != kept.original[1]
        assert body_of(folder, "scores.json")[0] == {}
        assert not [name for name in body_of(folder, "table.json") if name.startswith("layers.0")]


def test_scores_that_are_not_finite_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(folder, "prune.method=taylor")
    (folder / "out").mkdir(exist_ok=True)
    read = TensorReader.read

    def spoiled(self: TensorReader, name: str) -> torch.Tensor:
        tensor = read(self, name)
        return tensor * torch.nan if name == "model.layers.1.mlp.down_proj.gates" else tensor

    monkeypatch.setattr(TensorReader, "read", spoiled)
    with pytest.raises(StageError, match="select: layer 1: ffn scores contain NaN or infinity"):
        run_select(replace(context, out=folder / "out"))

"""Refining: what moves, what stays, that it helps, and who reads it."""

import json
from pathlib import Path

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model

from qlora_pipe import datasets
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.hf.sequences import collate
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.stages.models import base_model, decomposed_model
from qlora_pipe.verify import verify_path

REFINE = (
    "refine.enabled=true",
    "refine.steps=12",
    "refine.batch_size=4",
    "refine.length=48",
    "refine.learning_rate=0.01",
    "decompose.budget=3.5bits",
    "decompose.ranks=[0,4]",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refine")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module")
def artifacts(config: Path) -> dict[str, Artifact]:
    return compile_model(load(config, REFINE), Reporter(json_lines=True), until="prune")


def divergence(config: Path, artifacts: dict[str, Artifact], *overrides: str) -> float:
    """Of the full decomposed model from the original, per token of the calibration text."""
    seen = context_of(load(config, overrides), artifacts)
    dataset = seen.config.data.calibration
    batch = collate(
        rows(load_tokenizer(seen.base), datasets.load(dataset, "train", 0), length=48, count=8, name=dataset.source)
    )
    with torch.no_grad():
        total = summed_divergence(base_model(seen), decomposed_model(seen), batch)
    return float(total) / int((batch["labels"][:, 1:] >= 0).sum())


def test_the_tuned_model_is_nearer_to_the_original_and_is_the_one_that_is_read(
    config: Path, artifacts: dict[str, Artifact]
) -> None:
    tuned = divergence(config, artifacts, *REFINE)
    before = divergence(config, artifacts, *REFINE, "refine.enabled=false")
    assert 0 < tuned < 0.9 * before


def test_codes_and_everything_that_is_not_tuned_stay(artifacts: dict[str, Artifact]) -> None:
    before, after = (TensorReader(artifacts[stage].folder) for stage in ("decompose", "refine"))
    moved = {name.rpartition(".")[2] for name in before if not torch.equal(before.read(name), after.read(name))}
    assert moved <= {"levels", "scale_codes", "scale_max", "scale_offset", *FACTORS}
    assert {"levels", "scale_codes"} <= moved
    assert set(before) == set(after)


FACTORS = ("lowrank_left", "lowrank_right", "lowrank_scale")


def test_pruning_slices_the_tuned_maps(config: Path, artifacts: dict[str, Artifact]) -> None:
    tuned, pruned = (TensorReader(artifacts[stage].folder) for stage in ("refine", "prune"))
    name = "model.layers.0.self_attn.q_proj.levels"
    assert torch.equal(tuned.read(name), pruned.read(name))
    list(verify_path(artifacts["refine"].folder))


def test_refining_is_left_out_unless_it_is_asked_for(config: Path) -> None:
    made = compile_model(
        load(config, ("run=" + str(config.parent / "plain"),)), Reporter(json_lines=True), until="refine"
    )
    assert [path.name for path in made["refine"].folder.iterdir() if path.name != "manifest.json"] == ["skipped.json"]


def test_block_by_block_alone_and_before_end_to_end(config: Path) -> None:
    folder = config.parent
    blocks = (*REFINE, "refine.block_rows=8", "refine.block_rate=0.01")
    for name, settings, parts in (
        ("blocks", (*blocks, "refine.steps=0"), {"blocks"}),
        ("both", blocks, {"blocks", "steps"}),
    ):
        overrides = (*settings, f"run={folder / name}")
        made = compile_model(load(config, overrides), Reporter(json_lines=True), until="refine")
        history = json.loads((made["refine"].folder / "history.json").read_text())
        assert history.keys() == parts
        assert all(entry["after"] < entry["before"] for entry in history["blocks"])
        before = divergence(config, made, *overrides, "refine.enabled=false")
        assert 0 < divergence(config, made, *overrides) < 0.9 * before

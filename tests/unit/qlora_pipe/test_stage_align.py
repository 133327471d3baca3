"""Slot C: it helps on generic text, is what the task's adapter is trained on, and leaves nothing in the full model."""

import json
from pathlib import Path

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import nn

from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score, summed_divergence
from qlora_pipe.hf.model import AdaptedLinear
from qlora_pipe.hf.sequences import collate
from qlora_pipe.stages.models import aligned_model, base_model, packed_modules, pruned_model
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.stages.train import training_rows
from qlora_pipe.verify import verify_path

ALIGN = ("align.enabled=true", "align.steps=30", "align.rank=3", "align.alpha=6", "align.learning_rate=0.01")
NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("align")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module")
def artifacts(config: Path) -> dict[str, Artifact]:
    return compile_model(load(config, ALIGN), Reporter(json_lines=True))


def test_the_small_model_comes_nearer_to_its_teacher(config: Path, artifacts: dict[str, Artifact]) -> None:
    """On rows that it was trained on: the tiny text has no structure that would carry over."""
    seen = context_of(load(config, ALIGN), artifacts)
    batch = collate(training_rows(seen, seen.config.data.calibration, seen.config.align)[:16])
    teacher = base_model(seen)
    with torch.no_grad():
        before, after = (summed_divergence(teacher, make(seen), batch) for make in (pruned_model, aligned_model))
    assert after < 0.8 * before


def test_without_a_teacher_the_text_becomes_more_likely(config: Path) -> None:
    settings = load(config, (*ALIGN, "align.teacher=none", f"run={config.parent / 'text'}"))
    seen = context_of(settings, compile_model(settings, Reporter(json_lines=True), until="align"))
    chosen = training_rows(seen, seen.config.data.calibration, seen.config.align)[:16]
    assert score(aligned_model(seen), chosen).loss < score(pruned_model(seen), chosen).loss - 0.1


def test_the_packed_and_the_dense_model_are_the_same_function(config: Path, artifacts: dict[str, Artifact]) -> None:
    """1e-4: fp32 sums in another order."""
    seen = context_of(load(config, ALIGN), artifacts)
    ids = torch.arange(2, 34).view(2, 16)
    dense, packed = aligned_model(seen), aligned_model(seen, dense=False)
    assert all(isinstance(module, nn.Linear) for name, module in dense.named_modules() if name == NAME)
    assert isinstance(packed.get_submodule(NAME), AdaptedLinear)
    assert sorted(packed_modules(packed)) == sorted(name for _, _, name in seen.known.small.linears())
    expected = dense(input_ids=ids).logits
    torch.testing.assert_close(packed(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pruned_model(seen)(input_ids=ids).logits, expected, atol=1e-3)


def test_integers_start_from_both_slots(config: Path, artifacts: dict[str, Artifact]) -> None:
    """After one tiny step L4Q's factors are still those of C beside T, as one adapter of T's strength."""
    still = (*ALIGN, "compact.steps=1", "compact.learning_rate=1e-9", "compact.step_rate=1e-9", "compact.warmup=0")
    made = compile_model(load(config, still), Reporter(json_lines=True), until="compact")
    slots = {stage: TensorReader(made[stage].folder, "adapter") for stage in ("align", "train", "compact")}
    found_a, found_b = read_factors(slots["compact"].read, NAME)
    (c_a, c_b), (t_a, t_b) = (read_factors(slots[stage].read, NAME) for stage in ("align", "train"))
    assert len(found_a) == len(c_a) + len(t_a)
    assert c_b.abs().max() > 1e-3
    settings = load(config, still)
    strength = settings.train.alpha / settings.train.rank
    torch.testing.assert_close(strength * found_b @ found_a, 2 * c_b @ c_a + strength * t_b @ t_a, rtol=1e-4, atol=1e-5)


def test_the_full_model_gets_slot_t_alone(config: Path, artifacts: dict[str, Artifact]) -> None:
    small, full = (TensorReader(artifacts[stage].folder, "adapter") for stage in ("train", "recover"))
    kept = context_of(load(config, ALIGN), artifacts).index_map.kept_indices(0, "down")
    (small_a, small_b), (full_a, full_b) = (read_factors(slot.read, NAME) for slot in (small, full))
    assert torch.equal(full_a[:, kept], small_a)
    assert torch.equal(full_b, small_b)
    metrics = json.loads((artifacts["evaluate"].folder / "metrics.json").read_text())
    by_model = {row["model"]: row for row in metrics if row["dataset"] == "task"}
    assert by_model["aligned"]["bytes"] > by_model["pruned"]["bytes"]
    assert by_model["trained-small"]["bits_per_weight"] > by_model["aligned"]["bits_per_weight"]
    # L4Q's factors started from slot C, which is not the full model's.
    assert not list(artifacts["recover"].folder.glob("compact_adapter*"))
    for stage in ("align", "train", "recover"):
        assert len(list(verify_path(artifacts[stage].folder))) == 1


def test_the_small_export_has_both_slots(config: Path, artifacts: dict[str, Artifact], tmp_path: Path) -> None:
    settings = (*ALIGN, "compact.enabled=false", f"run={tmp_path / 'run'}")
    made = compile_model(load(config, settings), Reporter(json_lines=True), until="export")
    seen = context_of(load(config, settings), made)
    written = TensorReader(made["export"].folder / "small").read(f"{NAME}.weight")
    t_a, t_b = read_factors(TensorReader(made["train"].folder, "adapter").read, NAME)
    base = aligned_model(seen).get_submodule(NAME).weight
    expected = base + t_b @ t_a * (seen.config.train.alpha / seen.config.train.rank)
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-6)


def test_it_is_left_out_unless_it_is_asked_for(config: Path) -> None:
    run = config.parent / "plain"
    made = compile_model(load(config, (f"run={run}",)), Reporter(json_lines=True), until="train")
    assert [path.name for path in made["align"].folder.iterdir() if path.name != "manifest.json"] == ["skipped.json"]
    seen = context_of(load(config, (f"run={run}",)), made)
    ids = torch.arange(2, 34).view(2, 16)
    assert torch.equal(aligned_model(seen)(input_ids=ids).logits, pruned_model(seen)(input_ids=ids).logits)


@pytest.mark.parametrize("stage", ["align", "train", "compact"])
def test_more_tokens_than_there_are_cannot_be_learnt(config: Path, stage: str) -> None:
    settings = load(config, ("align.enabled=true", f"{stage}.teacher=original", f"{stage}.top=261"))
    with pytest.raises(ConfigError, match=rf"{stage}\.top 261 is more than the 260 tokens"):
        compile_model(settings, Reporter(json_lines=True), until="source")

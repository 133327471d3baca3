"""The task learnt from the original model's predictions too: what it does to the small models, and what it repeats."""

from pathlib import Path

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model

from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row, collate
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import base_model, integer_model, pruned_model, with_adapter
from qlora_pipe.stages.train import strength, task_rows

LONG = ("train.steps=20", "train.length=160", "train.learning_rate=0.02", "compact.steps=10", "compact.length=160")
TEXT = (*LONG, "train.packing=true", "compact.packing=true", "compact.learning_rate=0.02")
TAUGHT = (*TEXT, *(f"{stage}.{setting}" for stage in ("train", "compact") for setting in ("teacher=original", "top=8")))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


def made(config: Path, overrides: tuple[str, ...]) -> tuple[Context, dict[str, Artifact]]:
    settings = load(config, overrides)
    artifacts = compile_model(settings, Reporter(json_lines=True), until="compact")
    return context_of(settings, artifacts), artifacts


def divergences(seen: Context, rows: list[Row]) -> list[float]:
    """Of the adapted and of the integer model from the original."""
    adapter = TensorReader(seen.inputs["train"].folder, "adapter").read
    models: list[Model] = [
        pruned_model(seen, with_adapter(adapter, strength(seen), torch.float32)),
        integer_model(seen, seen.reader("compact")),
    ]
    with torch.no_grad():
        return [float(summed_divergence(base_model(seen), model, collate(rows))) for model in models]


def test_both_models_come_nearer_to_the_original(config: Path) -> None:
    seen, before = made(config, TEXT)
    rows = task_rows(seen, seen.config.train)
    assert len(rows) < 20 * 2, "rows come again"
    assert max(len(row.lengths) for row in rows) > 2, "rows share sequences"
    plain = divergences(seen, rows)
    seen, after = made(config, TAUGHT)
    assert all(found < 0.9 * without for found, without in zip(divergences(seen, rows), plain, strict=True))
    for stage in ("train", "compact"):
        assert {"teacher", "top", "teacher_share"} <= set(after[stage].manifest.settings)
        assert {"top", "teacher_share"} & set(before[stage].manifest.settings) == set()
    # What is ignored repeats nothing.
    _, again = made(config, (*TEXT, "train.teacher_share=0.1", "compact.top=3"))
    assert [again[stage].identity for stage in again] == [before[stage].identity for stage in before]

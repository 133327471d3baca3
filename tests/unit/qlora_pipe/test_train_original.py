"""LoRA on the small model's original weights: what was trained is what is measured, recovered and exported."""

from pathlib import Path

import pytest
import torch
from tiny import save_settings, save_texts, save_tiny_model
from tiny_training import Trained, logits, trained_run

from qlora_pipe import layouts
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.hf.loss import score
from qlora_pipe.plan import know, make_plan
from qlora_pipe.stages.models import adaptable_modules, compensation, sliced_base_weight, task_model, with_adapter
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.stages.recover import heldout_rows
from qlora_pipe.stages.train import strength
from quant.baselines import LoRALinear

ORIGINAL = (
    "train.base=original",
    "train.learning_rate=1e-2",
    "compact.enabled=false",
    *(f"align.{given}" for given in ("enabled=true", "rank=3", "steps=2", "batch_size=2", "length=64")),
    "align.learning_rate=1e-2",
)
WHOLE = ("prune.kv_ratio=0", "prune.ffn_ratio=0", "prune.align=64")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module")
def trained(config: Path) -> Trained:
    return trained_run(config, ORIGINAL)


def test_the_adapter_is_trained_on_the_original_weights_and_slot_c(trained: Trained) -> None:
    seen, modules = trained.seen, adaptable_modules(trained.model)
    for layer, role, name in seen.known.small.linears():
        module = modules[name]
        assert isinstance(module, LoRALinear)
        lora_a, lora_b = compensation(seen, name)
        expected = torch.addmm(sliced_base_weight(seen, layer, role, name)[0], lora_b, lora_a)
        assert torch.equal(module.base.weight, expected)
        assert (lora_b != 0).any()
        assert (module.task_b != 0).any()
    assert {name for name, p in trained.model.named_parameters() if p.requires_grad} == {
        f"{name}.task_{side}" for name in modules for side in "ab"
    }


def test_what_was_trained_is_what_is_measured(trained: Trained) -> None:
    seen = trained.seen
    adapter = seen.reader("train", "adapter").read
    stored = task_model(seen, with_adapter(adapter, strength(seen), seen.dtype))
    assert torch.equal(logits(stored), logits(trained.model))
    losses = seen.read_json("recover", "recovery.json")["losses"]
    held = heldout_rows(seen, seen.config.recover.rows)
    assert losses["small_adapted"] == score(trained.model, held).loss
    assert losses["small"] == score(task_model(seen), held).loss != losses["small_adapted"]
    found = {row["model"]: row for row in seen.read_json("evaluate", "metrics.json") if row["dataset"] == "task"}
    assert found["trained-small"]["bits_per_weight"] > 32 > found["pruned"]["bits_per_weight"]
    assert found["trained-small"]["bytes"] > 4 * seen.known.small.linear_weights()


def test_the_exported_small_model_is_the_trained_one(trained: Trained) -> None:
    seen, small = trained.seen, TensorReader(trained.out / "export" / "small")
    for name, module in adaptable_modules(trained.model).items():
        factors = read_factors(seen.reader("train", "adapter").read, name)
        expected = module.base.weight.clone().addmm_(factors[1], factors[0], alpha=strength(seen))
        assert torch.equal(small.read(f"{name}.weight"), expected)
    assert seen.read_json("export", "export.json")["small"]["weights"] == "original weights + adapters"


def test_memory_counts_the_dense_weights(config: Path) -> None:
    given = "compact.enabled=false"
    peaks = [
        next(stage for stage in make_plan(load(config, (given, f"train.base={base}"))).stages if stage.name == "train")
        for base in ("packed", "original")
    ]
    known = know(load(config, (given,)))
    dense = layouts.tensor_bytes(layouts.dense(known.small, "float32"))
    assert peaks[1].host_peak - peaks[0].host_peak == dense - layouts.tensor_bytes(known.pruned())
    assert peaks[1].reads != peaks[0].reads


def test_single_entries_are_refused(config: Path) -> None:
    given = ("train.base=original", "prune.sparsity.pattern='2:4'", *WHOLE, "compact.enabled=false")
    with pytest.raises(ConfigError, match=r"train\.base: original trains on weights of which prune\.sparsity"):
        load(config, given)

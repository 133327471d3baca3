"""L1 L2 trained in place (LQ-LoRA, LoftQ): what it moved by is the adapter, of twice its rank."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny import save_settings, save_texts, save_tiny_model
from tiny_training import Trained, logits, trained_run
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune.groups import PRUNED_AXIS
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.stages.models import packed_map, packed_modules, pruned_model, with_adapter
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.stages.train import strength
from qlora_pipe.verify import verify_path

IN_PLACE = (
    "decompose.ranks=[4, 8]",
    "decompose.rules=[{roles: [down], rank: 8}, {roles: [o], rank: 4}]",
    "train.low_rank=trained",
    "train.learning_rate=1e-2",
    "compact.enabled=false",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in-place")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module")
def trained(config: Path) -> Trained:
    return trained_run(config, IN_PLACE)


def moved(trained: Trained, layer: int, role: str, name: str) -> Tensor:
    """L1' L2' - L1 L2 of the small model, float64, from the trained model itself."""
    module = packed_modules(trained.model)[name]
    left, right = packed_map(trained.seen, trained.seen.reader("prune"), "prune", layer, role).factors()
    return module.task_b.double() @ module.task_a.double() - left.double() @ right.double()


def test_the_adapter_is_what_the_low_rank_part_moved_by(trained: Trained) -> None:
    seen, ranks = trained.seen, set()
    for layer, role, name in seen.known.small.linears():
        lora_a, lora_b = read_factors(seen.reader("train", "adapter").read, name)
        expected = moved(trained, layer, role, name)
        torch.testing.assert_close(lora_b.double() @ lora_a.double(), expected, rtol=0, atol=1e-12)
        assert expected.abs().max() > 1e-3
        rank = seen.known.allocation[name].rank
        assert lora_a.shape[0] == lora_b.shape[1] == 2 * rank
        ranks.add(rank)
    assert ranks == {4, 8}
    adapted = with_adapter(seen.reader("train", "adapter").read, strength(seen), seen.dtype)
    before, after, found = logits(pruned_model(seen)), logits(trained.model), logits(pruned_model(seen, adapted))
    torch.testing.assert_close(found, after, rtol=0, atol=1e-4 * after.abs().max().item())
    assert (before - after).abs().max() > 1e-2 * after.abs().max()


def test_on_the_full_model_the_kept_block_is_the_trained_one_and_nothing_else_moves(trained: Trained) -> None:
    seen = trained.seen
    for layer, role, name in seen.known.small.linears():
        lora_a, lora_b = read_factors(seen.reader("recover", "adapter").read, name)
        update, kept = lora_b.double() @ lora_a.double(), seen.index_map.kept_indices(layer, role)
        axis = 1 if PRUNED_AXIS[role] == "columns" else 0
        expected = torch.zeros_like(update).index_copy(axis, kept, moved(trained, layer, role, name))
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)
    assert {line.split()[0] for line in verify_path(trained.out)} >= {"train", "recover", "export"}


def test_peft_takes_a_rank_of_its_own_for_every_matrix(trained: Trained) -> None:
    folder = trained.out / "export"
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) | {config["r"]} == {8, 16}
    assert config["lora_alpha"] == config["r"]
    assert trained.seen.read_json("recover", "recovery.json")["scale"] != 0
    base = AutoModelForCausalLM.from_pretrained(trained.out / "base", dtype=torch.float32)
    before, adapted = logits(base), PeftModel.from_pretrained(base, folder / "peft")
    found, merged = logits(adapted), logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-4 * merged.abs().max().item())
    assert (found - before).abs().max() > 1e-2 * merged.abs().max()


def test_what_has_no_low_rank_part_is_refused(config: Path) -> None:
    given = ("train.low_rank=trained", "compact.enabled=false", "decompose.ranks=[4]")
    load(config, given)
    for more, said in (
        (("train.base=original",), "base: original has no low-rank part"),
        (("decompose.ranks=[0, 4]",), r"leave 0 out of decompose\.ranks"),
        (("compact.enabled=true",), r"set compact\.warm_start to false"),
    ):
        with pytest.raises(ConfigError, match=said):
            load(config, (*given, *more))

"""Operations on adapters against PEFT: what it loads of ours, and what it makes itself of the same adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_pipe.adapters.operations import Cut, add, subtract, truncate

IDS = torch.arange(3, 35)[None]

# Rank and strength by map, and other maps than the other adapter's.
FIRST = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"down_proj": 7},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
}
SECOND = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def shaken(model: Any, seed: int) -> Any:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = tmp_path_factory.mktemp("a") / "one", tmp_path_factory.mktemp("b") / "two"
    for seed, (folder, settings) in enumerate(zip(folders, (FIRST, SECOND), strict=True)):
        shaken(get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings)), seed).save_pretrained(folder)
    return folders


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits[0].double()
    return found


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


def changed(
    base: Path, adapters: tuple[Path, ...], weights: tuple[float, ...], turn: Callable[[Tensor], Tensor]
) -> Any:
    """The base with `turn` of the weighted sum of what PEFT says that the adapters add to each weight, in float64."""
    model, sums = load(base), {}
    for folder, weight in zip(adapters, weights, strict=True):
        adapted = PeftModel.from_pretrained(load(base), folder).double().base_model.model
        for name, module in adapted.named_modules():
            if hasattr(module, "get_delta_weight"):
                sums[name] = sums.get(name, 0) + weight * module.get_delta_weight("default")
    with torch.no_grad():
        for name, update in sums.items():
            model.get_submodule(name).weight += turn(update).float()
    return model


def test_a_sum_is_what_peft_concatenates(base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    weights = (1.0, 0.5)
    text = add(adapters, weights, tmp_path / "sum", Cut(), None, False)
    ours = PeftModel.from_pretrained(load(base), tmp_path / "sum")
    plain = logits(load(base))
    expected = logits(changed(base, adapters, weights, lambda update: update))
    close(logits(ours), expected)
    assert float((expected - plain).norm() / plain.norm()) > 0.1
    both = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="one")
    both.load_adapter(adapters[1], adapter_name="two")
    both.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type="cat")
    both.set_adapter("sum")
    close(logits(both), logits(ours))
    assert "all together" in text


@pytest.mark.parametrize("rank", [1, 4])
def test_a_truncated_adapter_is_the_truncated_update(
    base: Path, adapters: tuple[Path, Path], tmp_path: Path, rank: int
) -> None:
    def best(update: Tensor) -> Tensor:
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        return u[:, :rank] * s[:rank] @ vh[:rank]

    truncate(adapters[0], tmp_path / "cut", Cut(rank), None)
    ours = PeftModel.from_pretrained(load(base), tmp_path / "cut")
    close(logits(ours), logits(changed(base, adapters[:1], (1.0,), best)))


def test_ranks_by_energy_load(base: Path, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    truncate(adapters[0], tmp_path / "cut", Cut(energy=0.9), None)
    ours = PeftModel.from_pretrained(load(base), tmp_path / "cut")
    rows = json.loads((tmp_path / "cut" / "adapter_report.json").read_text())["matrices"]
    ranks = {name: row["rank"] for name, row in rows.items()}
    found = {
        name: module.r["default"] for name, module in ours.base_model.model.named_modules() if hasattr(module, "r")
    }
    assert {name: rank for name, rank in found.items() if isinstance(rank, int)} == ranks
    assert len(set(ranks.values())) > 1


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_difference_is_an_adapter_of_the_base_as_it_was(base: Path, tmp_path: Path, init: str) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    model = get_peft_model(load(base), config)
    # PEFT's own conversion wants the start under another name for its init.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    tuned = logits(shaken(model, 3))
    model.save_pretrained(tmp_path / "trained")
    subtract(tmp_path / "trained", tmp_path / "start", tmp_path / "out", Cut(), None, False)
    close(logits(PeftModel.from_pretrained(load(base), tmp_path / "out")), tuned)
    plain = logits(load(base))
    assert float((tuned - plain).norm() / plain.norm()) > 0.1
    # It loads the start beside the trained one, which it warns of.
    with pytest.warns(UserWarning, match="changes the base weights"):
        model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

"""Packed folders through stock transformers and PEFT."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_folder import packed_model, save_packed
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.errors import SourceError
from qlora_pipe.hf.adapters import packed_lora
from quant.exceptions import QuantError
from quant.linear import PackedLinear

IDS = torch.arange(24)[None] + 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Biases on q, k and v; tied embeddings.
    return save_tiny_model(tmp_path_factory.mktemp("base"), "qwen2")


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(base, tmp_path_factory.mktemp("packed") / "model")


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_the_loaded_model_is_the_packed_one(base: Path, folder: Path, model: PreTrainedModel) -> None:
    expected = logits(packed_model(base, TensorReader(folder)))
    assert torch.equal(logits(model), expected)
    assert expected.std() > 0.1
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_no_dense_weight_is_held(model: PreTrainedModel) -> None:
    maps = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(maps) == 14
    assert not [name for name, module in model.named_modules() if type(module) is nn.Linear and name != "lm_head"]
    for module in maps.values():
        sizes = {tensor.numel() for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()}
        assert max(sizes) < module.shape.in_features * module.shape.out_features


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_activations_alone(folder: Path, dtype: torch.dtype, device_map: str | None) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    stored = load_file(folder / "model.safetensors")
    maps = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] in maps:
            assert tensor.dtype == stored[name].dtype
            assert torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == dtype
    assert logits(model).dtype == dtype


def test_saving_keeps_every_tensor_and_the_config(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
    assert quantization_config(tmp_path) == quantization_config(folder)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_adapter_of_ours_is_trained(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.attach_adapter(2, 4.0, torch.Generator().manual_seed(0))
    model(IDS, labels=IDS).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 28
    assert all(parameter.grad is not None for parameter in trained.values())
    assert sum(float(parameter.grad.abs().sum()) for name, parameter in trained.items() if "task_b" in name) > 0


def test_peft_adapts_packed_maps(folder: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    expected = logits(model)
    roles = [f"{role}_proj" for role in ("q", "k", "v", "o", "gate", "up", "down")]
    tuned = get_peft_model(model, packed_lora(LoraConfig(r=2, target_modules=roles)))
    torch.testing.assert_close(logits(tuned), expected)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.5)
    tuned(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = logits(tuned)
    assert (changed - expected).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder),
        tmp_path,
        config=packed_lora(PeftConfig.from_pretrained(tmp_path)),
    )
    torch.testing.assert_close(logits(again), changed)
    with pytest.raises(QuantError, match="cannot be merged"):
        again.merge_and_unload()


def quantization_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def altered(folder: Path, copy: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy whose quantization_config went through `change`."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q: q.update(version=4), "expected version 1, 2 or 3, found 4"),
        (lambda q: q.update(version=3), "version 3, which belong to 1"),
        (lambda q: q.pop("formats"), "KeyError.'formats'"),
        (lambda q: q["formats"][0].update(bits=5), "bits must be one of"),
        (lambda q: q["formats"][0].pop("transposed"), "KeyError.'transposed'"),
        (lambda q: q["formats"][0].update(transposed=1), "transposed must be true or false"),
        (lambda q: q["modules"].update({"lm_head": 99}), "IndexError"),
        (lambda q: q["modules"].update({"lm_head": -1}), "by its number"),
        (lambda q: q.update(modules=[]), "AttributeError"),
        (lambda q: q["modules"].update({"model.layers.9.q": 0}), "no linear map there"),
        (lambda q: q["modules"].update({"model.norm": 0}), "no linear map there"),
        (lambda q: q["formats"][0].update(block_size=17), "does not fit model.layers.0.self_attn.q_proj"),
        (lambda q: q["formats"][0].update(rank=5), "implies TensorSpec"),
        (
            lambda q: q["formats"][0].update(grid="lloyd", scale_dtype="float16"),
            "scale_max: quantization_config implies",
        ),
    ],
)
def test_a_wrong_config_is_named(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    with pytest.raises(SourceError, match=says):
        AutoModelForCausalLM.from_pretrained(altered(folder, tmp_path / "copy", change))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.levels", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"]
)
def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    copy = altered(folder, tmp_path / "copy", lambda body: None)
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"expected a tensor {name}"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_a_model_without_head_is_refused(folder: Path) -> None:
    with pytest.raises(SourceError, match="load the folder with AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)

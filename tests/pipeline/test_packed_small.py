"""The folder of stage prune through stock transformers and PEFT: every family, equal widths and unequal ones."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pipeline.test_chain import FAMILIES, Recorder
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune.groups import ROLES, shape_of
from prune.indexmap import IndexMap
from qlora_pipe.architectures import linear_name
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import SourceError
from qlora_pipe.hf.adapters import packed_lora
from qlora_pipe.hf.model import Model
from qlora_pipe.stages.models import pruned_model
from qlora_pipe.verify import verify_path
from quant.linear import PackedLinear

IDS = torch.arange(40)[None] + 30
SMALL = "export.small=false"
PROTECTED = (SMALL, "prune.protect_first=1")
ALLOCATED = (SMALL, "prune.ratio=0.2", "prune.widths=allocated")
INT8 = "decompose.embeddings=int8"
SPARSE = (
    "prune.kv_ratio=0",
    "prune.ffn_ratio=0",
    "prune.align=64",
    "prune.sparsity.pattern=2:4",
    "compact.enabled=false",
)
CASES: dict[str, tuple[str, tuple[str, ...]]] = {family: (family, PROTECTED) for family in FAMILIES} | {
    "allocated": ("qwen3", (*ALLOCATED, INT8)),
    "uniform": ("mistral", (INT8,)),
    "uniform-tied": ("gemma3_text", ()),
    "whole": ("llama", ("prune.kv_ratio=0", "prune.ffn_ratio=0")),
    "sparse": ("gemma3_text", SPARSE),
}
EQUAL = ("uniform", "uniform-tied", "whole", "sparse")


class Small:
    """A run up to prune, its folder and what our own loader makes of it."""

    def __init__(self, place: Path, family: str, overrides: tuple[str, ...]) -> None:
        self.run, self.folder = place / "run", place / "run/prune"
        save_tiny_model(place / "model", family.partition("-")[0], num_hidden_layers=3, **FAMILIES[family])
        save_texts(place)
        settings = load(save_settings(place), overrides)
        context = context_of(settings, compile_model(settings, Recorder(), until="prune"))
        self.kept = IndexMap.from_json(json.loads((self.run / "select/kept.json").read_text()))
        self.small = [self.kept.kept_shape(layer) for layer in range(3)]
        context = replace(context, known=context.known.with_kept(self.small))
        self.expected = logits(pruned_model(context, dense=False))

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found


@pytest.fixture(scope="module", params=CASES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    found = Small(tmp_path_factory.mktemp("small"), *CASES[request.param])
    assert (len(set(found.small)) == 1) == (request.param in EQUAL)
    return found


@pytest.fixture(scope="module")
def unequal(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Biases on q, k and v; the first layer whole."""
    return Small(tmp_path_factory.mktemp("unequal"), "qwen2", PROTECTED)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def loaded(folder: Path) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_stock_transformers_loads_the_small_model(small: Small, tmp_path: Path) -> None:
    model = loaded(small.folder)
    assert small.expected.std() > 0.1
    assert torch.equal(logits(model), small.expected)
    assert AutoTokenizer.from_pretrained(small.folder)("word").input_ids
    tokens, seen = IDS, []
    for _ in range(4):  # without a cache, the whole text again for every token
        with torch.no_grad():
            step = model(tokens, use_cache=False).logits[:, -1]
        seen.append(step)
        tokens = torch.cat((tokens, step.argmax(-1, keepdim=True)), dim=1)
    made = model.generate(
        IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    cache = made.past_key_values
    assert [cache.layers[i].keys.shape[1] for i in range(3)] == [shape.kv_heads for shape in small.small]
    tolerance = 1e-4 * float(small.expected.abs().max())
    for found, expected in zip(made.logits, seen, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        == (small.config["quantization_config"])
    )
    assert torch.equal(logits(loaded(tmp_path)), small.expected)


def test_the_config_has_the_small_widths_or_the_sides_that_differ(small: Small) -> None:
    config, original = small.config, json.loads((small.run / "base/config.json").read_text())
    packed = config.pop("quantization_config")
    full, first = small.kept.original[0], small.small[0]
    if len(set(small.small)) == 1:
        assert packed["version"] == 1
        assert "sides" not in packed
        assert (config["num_attention_heads"], config["intermediate_size"]) == (first.heads, first.ffn)
    else:
        assert packed["version"] == 2
        assert config == original
        assert packed["sides"] == {
            linear_name(layer, role): list(shape_of(role, shape))
            for layer, shape in enumerate(small.small)
            for role in ROLES
            if shape_of(role, shape) != shape_of(role, full)
        }


def test_the_artifact_verifies_as_planned(small: Small) -> None:
    assert [line.split()[0] for line in verify_path(small.run)][-1] == "prune"
    plan = json.loads((small.run / "plan.json").read_text())
    assert plan["exact"]
    row = next(row for row in plan["stages"] if row["name"] == "prune")
    files = read_manifest(small.folder).files
    assert row["files"] == {name: entry.bytes for name, entry in files.items() if ".safetensors" in name}
    assert {"config.json", "tokenizer.json"} <= files.keys()


def test_peft_adapts_maps_of_their_own_sides(unequal: Small, tmp_path: Path) -> None:
    roles = [f"{role}_proj" for role in ("q", "k", "v", "o", "gate", "up", "down")]
    tuned = get_peft_model(loaded(unequal.folder), packed_lora(LoraConfig(r=2, target_modules=roles)))
    torch.testing.assert_close(logits(tuned), unequal.expected)
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.5)
    tuned(IDS, labels=IDS).loss.backward()
    trained = {name: each for name, each in tuned.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * 3 * 7
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for name, each in trained.items() if "_B" in name)
    optimizer.step()
    changed = logits(tuned)
    assert (changed - unequal.expected).abs().max() > 1e-3
    tuned.save_pretrained(tmp_path)
    config = packed_lora(PeftConfig.from_pretrained(tmp_path))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(loaded(unequal.folder), tmp_path, config=config)), changed
    )


def test_maps_stay_packed(unequal: Small) -> None:
    maps = [module for module in loaded(unequal.folder).modules() if isinstance(module, PackedLinear)]
    assert len(maps) == 21
    for module in maps:
        sizes = {tensor.numel() for tensor in module.buffers() if tensor.is_floating_point()}
        assert max(sizes) < module.shape.in_features * module.shape.out_features


NINTH = "model.layers.9.mlp.up_proj"


def _set(name: str, sides: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: body["sides"].update({f"model.layers.1.{name}_proj": sides})


def _widen(body: dict[str, Any]) -> None:
    """A pruned layer as any, but of more channels than the tensors have."""
    prefix = "model.layers.1.mlp"
    body["sides"] |= {
        f"{prefix}.gate_proj": [160, 64],
        f"{prefix}.up_proj": [160, 64],
        f"{prefix}.down_proj": [64, 160],
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(version=1), "sides .* in version 1"),
        (lambda body: body.update(version=3), "sides .* in version 3, which belong to 2"),
        (_set("self_attn.q", [-32, 64]), "above 0"),
        (_set("self_attn.q", [48, 64]), r"q_proj: expected sides \[32, 64\]"),
        (_set("self_attn.k", [32, 64]), r"q_proj: expected sides \[64, 64\]"),
        (_set("mlp.up", [64, 128]), r"up_proj: expected sides \[\d+, 64\]"),
        (lambda body: body["sides"].pop("model.layers.1.mlp.up_proj"), "up_proj: expected sides"),
        (lambda body: body["sides"].update({NINTH: [64, 64]}), "in version 2, which belong to 3"),
        (
            lambda body: (body["sides"].update({NINTH: [64, 64]}), body["modules"].update({NINTH: 0})),
            "layers.9.mlp.up_proj: expected a linear map of a block, found none",
        ),
        (_widen, "quantization_config implies TensorSpec"),
        (lambda body: (body.pop("sides"), body.update(version=1)), "quantization_config implies TensorSpec"),
    ],
)
def test_wrong_sides_are_named(
    unequal: Small, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(unequal.folder, copy)
    config = unequal.config
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=says):
        loaded(copy)

"""The dense small model whose layers differ in width, or have biases that the family has not, loaded by stock
transformers once qlora_pipe is imported."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipeline.test_chain import FAMILIES, Recorder
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune.indexmap import IndexMap
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import SourceError
from qlora_pipe.hf.model import Model
from qlora_pipe.stages.models import aligned_model, integer_model, packed_map, pruned_model, with_adapter
from qlora_pipe.stages.train import strength
from qlora_pipe.verify import verify_path

IDS = torch.arange(40)[None] + 30
UP = "model.layers.1.mlp.up_proj"
BIAS = "prune.bias=true"
ALIGNED = ("align.enabled=true", *(f"align.{key}" for key in ("rank=2", "steps=2", "batch_size=1", "length=64")))
CASES = {
    "integers": ("qwen2", ("prune.ratio=0.2", "prune.widths=allocated", BIAS)),
    "equal": ("mistral", (BIAS,)),
    "biased": ("llama-bias", (BIAS, "prune.protect_first=1")),
    "adapters": ("gemma3_text", ("prune.protect_first=1", "compact.enabled=false", *ALIGNED)),
}
ROUGH = {"rtol": 0.1, "atol": 0.5}


class Exported:
    """A finished run of unequal widths, and what our own loader makes of the model that was exported."""

    def __init__(self, place: Path, family: str, overrides: tuple[str, ...]) -> None:
        self.run, self.folder = place / "run", place / "run/export/small"
        save_tiny_model(place / "model", family.partition("-")[0], num_hidden_layers=3, **FAMILIES[family])
        save_texts(place)
        settings = load(save_settings(place), ("train.learning_rate=0.02", *overrides))
        context = context_of(settings, compile_model(settings, Recorder(), until="export"))
        self.kept = IndexMap.from_json(json.loads((self.run / "select/kept.json").read_text()))
        assert (len(set(self.kept.kept_shapes)) == 1) == (family == "mistral")
        self.context = context = replace(context, known=context.known.with_kept(self.kept.kept_shapes))
        if settings.compact.enabled:
            self.expected = logits(integer_model(context, context.reader("compact")))
        else:
            trained = context.reader("train", "adapter").read
            self.expected = logits(aligned_model(context, with_adapter(trained, strength(context), context.dtype)))


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("exported"), *CASES[request.param])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def loaded(folder: Path, **options: Any) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_it_is_the_model_that_was_trained(exported: Exported, tmp_path: Path) -> None:
    model = loaded(exported.folder)
    torch.testing.assert_close(logits(model), exported.expected, rtol=1e-5, atol=1e-5)
    assert {type(module) for name, module in model.named_modules() if name.endswith("_proj")} == {nn.Linear}
    assert AutoTokenizer.from_pretrained(exported.folder)("word").input_ids
    made = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 43)
    torch.testing.assert_close(
        logits(loaded(exported.folder, dtype=torch.bfloat16)).float(), exported.expected, **ROUGH
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


def test_biases_are_the_means_of_what_went(exported: Exported) -> None:
    """In float64, from the weights before they were cut; packed, as integers and exported, and nowhere else."""
    context = exported.context
    packed, dense = loaded(exported.run / "prune"), loaded(exported.folder)
    torch.testing.assert_close(logits(packed), logits(pruned_model(context, dense=False)))
    original, moments = context.base_reader, context.reader("calibrate", "moments")
    for layer, role, name in context.known.architecture.linears():
        if role not in ("o", "down"):
            continue
        had = f"{name}.bias" in original.locations
        assert (packed.get_submodule(name).bias is not None) == (context.config.prune.bias or had)
        if context.config.prune.bias:
            weight = packed_map(context, context.reader("decompose"), "decompose", layer, role).dequantized().double()
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            gone[exported.kept.kept_indices(layer, role)] = False
            expected = weight[:, gone] @ moments.read(f"{name}.mean").double()[gone]
            expected += original.read(f"{name}.bias") if had else 0
            for model in (packed, dense):
                torch.testing.assert_close(model.get_submodule(name).bias.double(), expected, rtol=1e-5, atol=1e-6)
            assert had or bool(expected.any()) == bool(gone.any())


def test_it_is_planned_and_verified(exported: Exported) -> None:
    assert [line.split()[0] for line in verify_path(exported.run)][-1] == "export"
    plan = json.loads((exported.run / "plan.json").read_text())
    row = next(row for row in plan["stages"] if row["name"] == "export")
    sizes = {name: (exported.run / "export" / name).stat().st_size for name in row["files"]}
    assert sizes == row["files"]
    assert any(name.startswith("small/") for name in sizes)


def test_it_takes_adapters(exported: Exported) -> None:
    tuned = get_peft_model(loaded(exported.folder), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    tuned(IDS, labels=IDS).loss.backward()
    trained = [each for name, each in tuned.named_parameters() if each.requires_grad and "lora_B" in name]
    assert len(trained) == 6
    assert all(each.grad is not None and bool(each.grad.any()) for each in trained)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.setdefault("sides", {}).update({UP: [7, 64]}), "up_proj: expected sides"),
        (
            lambda body: body.update(sides={}, biases=[], version=1),
            "quantization_config implies|has no place for the tensor",
        ),
        (lambda body: body.update(version=2), "in version 2, which belong to 3"),
        (lambda body: body.update(sides={"model.embed_tokens": [260, 64]}), "expected a linear map of a block"),
        (lambda body: body.update(biases=["model.embed_tokens"]), "model.embed_tokens, but .* no linear map there"),
        (
            lambda body: body.update(biases=["model.layers.9.mlp.up_proj"]),
            "layers.9.mlp.up_proj, but .* no linear map",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    exported: Exported, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported.folder, copy)
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=says):
        loaded(copy)

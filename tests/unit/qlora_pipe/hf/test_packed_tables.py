"""Packed embeddings and heads through stock transformers and PEFT: tied, not tied, and scaled as Gemma's are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from packed_folder import choice_of, packed_model, save_packed
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from pipeline.test_chain import FAMILIES
from safetensors.torch import load_file
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora_pipe import layouts
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.errors import SourceError, UnsupportedModel
from qlora_pipe.hf.adapters import packed_lora
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.model import Model, dense_linear
from qlora_pipe.hf.packed import packed_like
from qlora_pipe.hf.sequences import collate
from qlora_pipe.stages.packing import read_packed
from quant.embedding import PackedEmbedding, TiedHead
from quant.linear import PackedLinear
from quant.storage import Choice, PackedShape

IDS = torch.arange(24)[None] + 40
TIED, UNTIED = "gemma3_text", "mistral"


@pytest.fixture(scope="module", params=["qwen2", UNTIED, "gemma", "gemma2", TIED])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    return save_tiny_model(tmp_path_factory.mktemp("tables") / family, family, **FAMILIES[family])


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    return save_packed(base, base.parent / "packed", "int8")


@pytest.fixture
def model(folder: Path) -> Model:
    return AutoModelForCausalLM.from_pretrained(folder)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def dense_twin(base: Path, folder: Path) -> Model:
    """Every packed tensor dequantised into a model of plain modules."""
    tiny, reader = TinyFolder(base), TensorReader(folder)
    tables = layouts.tables(tiny.architecture, "int8")

    def linear(layer: int, role: str, name: str) -> nn.Module:
        packed = read_packed(reader.read, name, layouts.packed_shape(tiny.architecture, layer, role, choice_of(role)))
        return dense_linear(packed.dequantized(), packed.bias)

    class Dense(TensorReader):
        def read_float(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            module = name.removesuffix(".weight")
            if module in tables:
                return read_packed(self.read, module, tables[module]).dequantized()
            return super().read_float(name, dtype)

    tiny.reader = Dense(folder)
    return tiny.build(linear)


def test_the_loaded_model_is_the_packed_one(base: Path, folder: Path, model: Model) -> None:
    ours, dense = packed_model(base, TensorReader(folder), "int8"), dense_twin(base, folder)
    expected = logits(model)
    assert torch.equal(logits(ours), expected)
    embedded = model.get_input_embeddings()
    assert isinstance(embedded, PackedEmbedding)
    assert torch.equal(embedded(IDS), dense.get_input_embeddings()(IDS))
    torch.testing.assert_close(expected, logits(dense), rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert expected.std() > 0.1
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 27)
    batch = collate(byte_rows(["some text of a line", "another"]))
    with torch.no_grad():
        torch.testing.assert_close(summed_loss(ours, batch), summed_loss(dense, batch), rtol=1e-4, atol=1e-4)


def test_a_tied_head_has_no_tensor_of_its_own(base: Path, folder: Path, model: Model) -> None:
    tied = TinyFolder(base).architecture.tied
    stored, head = load_file(folder / "model.safetensors"), model.get_output_embeddings()
    assert ("lm_head.codes" in stored) is not tied
    assert isinstance(head, TiedHead if tied else PackedLinear)
    assert (head.qweight is model.get_input_embeddings().codes) == tied
    for each in (model, packed_model(base, TensorReader(folder), "int8")):
        each.tie_weights()  # again, as training code may
        assert each.state_dict().keys() == stored.keys()
    largest = max(tensor.numel() for tensor in model.parameters())
    assert largest < 260 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_dtype_is_that_of_activations_alone(
    base: Path, folder: Path, dtype: torch.dtype, device_map: str | None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device_map)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name.startswith(("model.embed_tokens", "lm_head")):
            assert tensor.dtype == stored[name].dtype
            assert torch.equal(tensor, stored[name])
    # As a stock embedding of the dequantised rows, in that dtype from the start.
    stock = dense_twin(base, folder).to(dtype).get_input_embeddings()
    assert torch.equal(model.get_input_embeddings()(IDS), stock(IDS))
    assert logits(model).dtype == dtype


def test_saving_keeps_every_tensor(folder: Path, model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(tensor.dtype == after[name].dtype for name, tensor in before.items())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    configs = [json.loads((each / "config.json").read_text())["quantization_config"] for each in (folder, tmp_path)]
    assert configs[0] == configs[1]
    assert configs[0]["version"] == 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_gradients_reach_adapters_as_through_a_dense_model(base: Path, folder: Path, model: Model) -> None:
    found = []
    for each in (model, packed_model(base, TensorReader(folder), "int8")):
        each.requires_grad_(False)
        for name, module in each.named_modules():
            if isinstance(module, PackedLinear) and name != "lm_head":
                module.attach_adapter(2, 4.0, torch.Generator().manual_seed(0))
        each(IDS, labels=IDS).loss.backward()
        found.append({name: parameter.grad for name, parameter in each.named_parameters() if parameter.requires_grad})
    assert len(found[0]) == 28
    assert all(torch.equal(found[0][name], gradient) for name, gradient in found[1].items())
    assert sum(float(gradient.abs().sum()) for name, gradient in found[0].items() if "task_b" in name) > 0


def test_peft_adapts_the_maps_and_the_head(folder: Path, model: Model, tmp_path: Path) -> None:
    expected = logits(model)
    tuned = get_peft_model(model, packed_lora(LoraConfig(r=2, target_modules=["q_proj", "lm_head"])))
    assert torch.equal(logits(tuned), expected)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    tuned(IDS, labels=IDS).loss.backward()
    optimizer.step()
    changed = logits(tuned)
    assert (changed - expected).abs().max() > 1e-3
    # PEFT would save the head along with an adapter of it.
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    config = packed_lora(PeftConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path, config=config)
    torch.testing.assert_close(logits(again), changed)


@pytest.mark.parametrize(
    ("family", "change", "says"),
    [
        (TIED, {"modules": {"lm_head": 0}}, "packs lm_head, but config.json ties it"),
        (UNTIED, {"transposed": True}, "does not fit model.embed_tokens: .* not transposed"),
        (UNTIED, {"block_size": 48}, "does not fit model.embed_tokens: 64 columns do not split into blocks of 48"),
        (UNTIED, {"bits": 4}, "tensor model.embed_tokens.codes: quantization_config implies"),
    ],
)
def test_a_wrong_config_is_named(family: str, change: dict[str, object], says: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", family, **FAMILIES[family])
    folder = save_packed(base, tmp_path / "packed", "int8")
    config = json.loads((folder / "config.json").read_text())
    body = config["quantization_config"]
    body["modules"] |= change.pop("modules", {})
    body["formats"][body["modules"]["model.embed_tokens"]] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=says):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_tied_config_for_an_untied_file_is_named(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base")
    folder = save_packed(base, tmp_path / "packed", "int8")
    untied = shutil.copytree(folder, tmp_path / "untied")
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"expected a tensor lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(untied)


def test_an_embedding_that_does_more_is_refused() -> None:
    class Odd(nn.Embedding):
        pass

    shape = PackedShape(64, 260, Choice("int", 8, 64, 0, 16, "float16"), transposed=False)
    with pytest.raises(UnsupportedModel, match="found Odd;"):
        packed_like(Odd(260, 64), shape, torch.float32)

"""The integer model in the formats of other tools, loaded in a process that does not know of us."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gptq_reader import read_map
from pipeline.test_chain import Recorder
from safetensors.torch import load_file
from tiny import context_of, save_settings, save_texts, save_tiny_model
from tiny_integers import Integers
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import integer_model
from qlora_pipe.verify import verify_path
from quant.pack import unpack

IDS = torch.arange(40)[None] + 30
FORMATS = ("compressed-tensors", "gptq", "gptq_v2")
OPTIONS = (
    "compact.offset=zero",
    "compact.rules=[{roles: [down], bits: 8}, {roles: [q], bits: 3}, {roles: [v], bits: 2}]",
    "prune.kv_ratio=0",
    f"export.integer=[{', '.join(FORMATS)}]",
)
WIDTHS = (2, 3, 4, 8)
# Codes are those that the library itself unpacks, before its first forward makes the weights dense.
SCRIPT = """
import sys
import torch
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in model.named_modules():
        if hasattr(module, "weight_packed"):
            bits = module.quantization_scheme.weights.num_bits
            found[f"{folder}:{name}"] = unpack_from_int32(module.weight_packed, bits, module.weight_shape)
    with torch.no_grad():
        found[folder] = model(torch.arange(40)[None] + 30).logits
assert not {"qlora_pipe", "quant"} & set(sys.modules)
save_file(found, sys.argv[1])
"""


class Exported:
    """A finished run with four widths, models of one width each, and what stock transformers makes of their folders."""

    def __init__(self, place: Path) -> None:
        self.folder = place / "run/export"
        model = save_tiny_model(place / "model", "qwen2")
        save_texts(place)
        settings = load(save_settings(place), OPTIONS)
        self.context: Context = context_of(settings, compile_model(settings, Recorder(), until="export"))
        self.reader: TensorReader = self.context.reader("compact")
        with torch.no_grad():
            self.logits: Tensor = integer_model(self.context, self.reader)(IDS).logits
        self.uniform = {bits: Integers(model, dict.fromkeys("qkvo", bits) | _ffn(bits)) for bits in WIDTHS}
        for bits, integers in self.uniform.items():
            (place / str(bits)).mkdir()
            integers.write(place / str(bits), "compressed-tensors", "float32")
        folders = [self.folder / "compressed-tensors", *(place / str(bits) for bits in WIDTHS)]
        # -I: nothing of this checkout is on the path.
        command = [sys.executable, "-I", "-W", "error::UserWarning", "-c", SCRIPT, str(place / "found")]
        done = subprocess.run([*command, *map(str, folders)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = load_file(place / "found")
        self.found = {key.removeprefix(f"{place}/").removeprefix("run/export/"): value for key, value in found.items()}


def _ffn(bits: int) -> dict[str, int]:
    return dict.fromkeys(("gate", "up", "down"), bits)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("integers"))


def codes(exported: Exported, name: str) -> Tensor:
    """What compact stored, unsigned [out, in]."""
    columns = exported.context.known.small.linear_shapes()[name][1]
    return unpack(exported.reader.read(f"{name}.codes"), exported.context.known.integer_bits[name], columns)


def test_stock_transformers_has_the_trained_codes_and_logits(exported: Exported) -> None:
    bits = exported.context.known.integer_bits
    assert set(bits.values()) == set(WIDTHS)
    for name, width in bits.items():
        read = exported.found[f"compressed-tensors:{name}"].int() + 2 ** (width - 1)
        assert torch.equal(read, codes(exported, name).int())
    assert exported.logits.std() > 0.1
    # Weights are the same bit for bit, and so is the product.
    assert torch.equal(exported.found["compressed-tensors"], exported.logits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width_for_all_maps(exported: Exported, bits: int) -> None:
    integers = exported.uniform[bits]
    for name, expected in integers.codes.items():
        assert torch.equal(exported.found[f"{bits}:{name}"].int() + 2 ** (bits - 1), expected.int())
    with torch.no_grad():
        assert torch.equal(exported.found[str(bits)], integers.model()(IDS).logits)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_an_independent_reader_of_gptq_has_them(exported: Exported, version: str) -> None:
    """Put into the stock small model, its weights differ by the rounding of steps and biases to fp16 alone."""
    tensors = load_file(exported.folder / version / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(exported.folder / "small")
    for name, width in exported.context.known.integer_bits.items():
        read, _, weight = read_map(tensors, name, width, version)
        assert (read == codes(exported, name).numpy()).all()
        module = model.get_submodule(name)
        module.weight.data = torch.from_numpy(weight).float()
        if module.bias is not None:
            module.bias.data = tensors[f"{name}.bias"].float()
    with torch.no_grad():
        found = model(IDS).logits
    assert 0 < float((found - exported.logits).norm() / exported.logits.norm()) < 2**-8


def test_every_folder_has_a_card_of_what_the_artifacts_say(exported: Exported) -> None:
    run = exported.folder.parent
    recovery, source = (
        json.loads((run / name).read_text()) for name in ("recover/recovery.json", "source/source.json")
    )
    allocation = json.loads((run / "allocate/allocation.json").read_text())
    for name in ("peft", "merged", "small", *FORMATS):
        card = (exported.folder / name / "README.md").read_text()
        assert exported.context.inputs["source"].manifest.inputs["model"] in card
        assert source["license"] is None
        assert "it states no licence" in card
        assert f"budget was 6bits; its decomposed model takes {allocation['bits_per_weight']:.4g} bits" in card
        assert f"loss {recovery['losses']['full_adapted']:.4f} with it" in card or name not in ("peft", "merged")
        widths = "2 matrices of 2 bits, 2 matrices of 3 bits, 8 matrices of 4 bits, 2 matrices of 8 bits"
        integers = f"{widths}; those of the last step of training, bit for bit"
        assert (integers in card) == (name in FORMATS)
    assert "none by more than" in (exported.folder / "gptq/README.md").read_text()
    assert "PeftModel.from_pretrained(base" in (exported.folder / "peft/README.md").read_text()


def test_the_run_says_what_is_exact_and_keeps_its_plan(exported: Exported) -> None:
    said = json.loads((exported.folder / "export.json").read_text())
    assert [said[name]["exact"] for name in FORMATS] == [True, False, False]
    assert 1e-6 < said["gptq"]["largest_change_of_a_step"] == said["gptq_v2"]["largest_change_of_a_step"] <= 2**-11
    plan = json.loads((exported.folder.parent / "plan.json").read_text())
    planned = next(row["files"] for row in plan["stages"] if row["name"] == "export")
    assert {name.partition("/")[0] for name in planned} == {"peft", "merged", "small", *FORMATS}
    assert {name: (exported.folder / name).stat().st_size for name in planned} == planned
    assert len(list(verify_path(exported.context.inputs["export"].folder))) == 1

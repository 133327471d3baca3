"""The full decomposed model as stock transformers and bitsandbytes load it, in a process that does not know of us."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from pipeline.test_chain import Recorder
from safetensors.torch import load_file
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import Tensor

from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.consumers import Check, open_run
from qlora_pipe.layouts import bitsandbytes_maps
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import decomposed_model
from qlora_pipe.stages.packing import read_packed
from qlora_pipe.verify import verify_path
from quant.buffers import first_level_scales
from quant.pack import unpack

IDS = torch.arange(40)[None] + 30
# Two block sizes and ranks, by rule; one v has no low-rank part.
OPTIONS = (
    "decompose.grids=[nf]",
    "decompose.bits=[4]",
    "decompose.block_sizes=[32, 64]",
    "decompose.ranks=[0, 4, 8]",
    "decompose.budget=12bits",
    "decompose.ties=[]",
    "decompose.rules=[{roles: [q, k], rank: 4, block_size: 32}, {layers: [0], roles: [v], rank: 4}, "
    "{layers: [1], roles: [v], rank: 0}, {roles: [gate, up], rank: 8, block_size: 64}]",
    "export.packed=[bitsandbytes]",
    *(f"export.{folder}=false" for folder in ("peft", "merged", "small")),
    "compact.enabled=false",
)
SCRIPT = """
import sys
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[2], device_map="cpu")
found = {}
for name, module in model.named_modules():
    if type(module).__name__ == "Linear4bit":
        found[name] = dequantize_4bit(module.weight.data, module.weight.quant_state).clone()
model = PeftModel.from_pretrained(model, sys.argv[2] + "/adapter")
with torch.no_grad():
    found["logits"] = model(torch.arange(40)[None] + 30).logits
    found["one"] = model(torch.tensor([[7]])).logits
assert not {"qlora_pipe", "quant"} & set(sys.modules)
save_file(found, sys.argv[1])
"""


class Exported:
    """A finished run, and what stock transformers, bitsandbytes and PEFT make of its folder."""

    def __init__(self, place: Path) -> None:
        save_tiny_model(place / "model", "qwen2")
        save_texts(place)
        settings = load(save_settings(place), OPTIONS)
        self.context: Context = context_of(settings, compile_model(settings, Recorder()))
        self.run, self.folder = place / "run", place / "run/export/bitsandbytes"
        command = [sys.executable, "-I", "-c", SCRIPT, str(place / "found"), str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        self.said = done.stderr
        self.found = load_file(place / "found")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("bitsandbytes"))


def test_codes_and_scales_are_those_of_the_run(exported: Exported) -> None:
    context, stored = exported.context, TensorReader(exported.folder)
    reader, maps = (
        context.reader("decompose"),
        bitsandbytes_maps(exported.context.known.architecture, exported.context.known.allocation),
    )
    assert {shape.choice.block_size for shape in maps.values()} == {32, 64}
    assert {shape.choice.rank for shape in maps.values()} == {0, 4, 8}
    assert {name for name in exported.found if name.startswith("model")} == set(maps)
    assert len(maps) == 10
    levels = get_4bit_type("nf4", device="cpu")
    for name, shape in maps.items():
        octets = stored.read(f"{name}.weight").view(shape.rows, -1)
        codes = torch.stack([octets >> 4, octets & 15], dim=-1).view(shape.rows, shape.columns)
        assert torch.equal(codes, unpack(reader.read(f"{name}.codes"), 4, shape.columns))
        # Its levels are written out with fewer digits than ours, 2^-23 apart at most.
        scale = first_level_scales(read_packed(reader.read, name, shape).frozen(), shape)
        steps = scale.repeat_interleave(shape.choice.block_size, dim=1)
        assert torch.equal(exported.found[name], levels[codes.int()] * steps)
    for layer in range(2):
        assert stored.read(f"model.layers.{layer}.mlp.down_proj.weight").dtype == torch.float32


def test_logits_are_those_of_the_decomposed_model(exported: Exported) -> None:
    """Of a row, and of a single token, for which bitsandbytes has kernels of their own."""
    with torch.no_grad():
        model = decomposed_model(exported.context)
        expected: Tensor = model(IDS).logits
        one: Tensor = model(torch.tensor([[7]])).logits
    assert expected.std() > 0.1
    for found, own in ((exported.found["logits"], expected), (exported.found["one"], one)):
        assert float((found - own).norm() / own.norm()) < 1e-5
    # PEFT warns of adapters that it makes where the file has none.
    assert "missing adapter keys" not in exported.said


def test_it_is_planned_verified_and_checked(exported: Exported) -> None:
    plan = json.loads((exported.run / "plan.json").read_text())
    planned = next(row["files"] for row in plan["stages"] if row["name"] == "export")
    assert set(planned) == {"bitsandbytes/model.safetensors", "bitsandbytes/adapter/adapter_model.safetensors"}
    assert {name: (exported.run / "export" / name).stat().st_size for name in planned} == planned
    assert list(verify_path(exported.context.inputs["export"].folder))
    card = (exported.folder / "README.md").read_text()
    assert "Q of q, k, v, gate and up as NF4" in card
    verdict = Check(open_run(exported.run)[0], exported.run, "float32").verdict("bitsandbytes")
    assert (verdict.holds, verdict.reader, verdict.tolerance) == (True, "bitsandbytes", 1e-4)

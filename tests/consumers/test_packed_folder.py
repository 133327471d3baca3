"""The decompose artifact, loaded by stock transformers in a process that knows of us only `import qlora_pipe`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import save_settings, save_texts, save_tiny_model
from tiny_models import TinyFolder

from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.model import dense_linear
from qlora_pipe.layouts import packed_shape
from qlora_pipe.stages.packing import read_packed

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import qlora_pipe
assert not {"torch", "transformers"} & set(sys.modules)
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
assert AutoTokenizer.from_pretrained(folder)("word").input_ids
ids = torch.arange(40)[None] + 30
tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
# Nothing of ours is named: a packed map is what has codes, and its sides are those of its low-rank factors.
maps = [module for module in model.modules() if hasattr(module, "codes")]
for module in maps:
    dense = len(module.lowrank_left) * module.lowrank_right.shape[1]
    assert not [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.numel() >= dense]
    module.attach_adapter(2, 2.0, torch.Generator().manual_seed(0))
found = model(ids, labels=ids)
found.loss.backward()
gradient = sum(float(module.task_b.grad.abs().sum()) for module in maps)
save_file({"logits": found.logits.detach(), "maps": torch.tensor(len(maps)), "tokens": tokens,
           "gradient": torch.tensor(gradient)}, out)
"""


def test_stock_transformers_loads_what_decompose_wrote(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", "qwen2")
    save_texts(tmp_path)
    compile_model(load(save_settings(tmp_path), ()), Reporter(json_lines=True), until="decompose")
    folder, run = tmp_path / "run/decompose", tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT, str(folder), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr

    tiny, reader = TinyFolder(run / "base"), TensorReader(folder)
    allocation = read_allocation(json.loads((run / "allocate/allocation.json").read_text()))

    def linear(layer: int, role: str, name: str) -> torch.nn.Module:
        packed = read_packed(reader.read, name, packed_shape(tiny.architecture, layer, role, allocation[name]))
        return dense_linear(packed.dequantized(), packed.bias)

    with torch.no_grad():
        expected = tiny.build(linear)(torch.arange(40)[None] + 30).logits
    found = load_file(tmp_path / "found")
    assert int(found["maps"]) == 14
    assert found["tokens"].shape == (1, 44)
    assert float(found["gradient"]) > 0
    # Q and L1 L2 are multiplied one after the other there, as their sum here.
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1

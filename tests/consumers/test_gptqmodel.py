"""GPTQ checkpoints loaded by GPTQModel itself, in a process that does not know of us: `make consumers`.

GPTQModel pins numpy, so that it needs an environment of its own; without it these tests are skipped.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny_model
from tiny_integers import Integers
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs GPTQModel")

IDS = torch.arange(40)[None] + 30
MODELS: dict[str, dict[str, int]] = {
    "mixed": {"down": 8, "q": 3, "v": 2},
    **{str(bits): dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), bits) for bits in (2, 3, 4, 8)},
}
VERSIONS = ("gptq", "gptq_v2")
# The one kernel that reads every width on a CPU; it computes in bfloat16.
SCRIPT = """
import sys
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file

found = {}
for folder in sys.argv[2:]:
    model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16, device="cpu").model
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            found[f"{folder}:{name}"] = module.dequantize_weight().T.float().contiguous()
    with torch.no_grad():
        found[folder] = model(torch.arange(40)[None] + 30).logits.float()
assert not {"qlora_pipe", "quant"} & set(sys.modules)
save_file(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Integers]:
    base = save_tiny_model(tmp_path_factory.mktemp("model"), "qwen2")
    return {name: Integers(base, bits) for name, bits in MODELS.items()}


@pytest.fixture(scope="module")
def found(models: dict[str, Integers], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights by "model/version:map", logits by "model/version"."""
    place = tmp_path_factory.mktemp("gptq")
    for name, integers in models.items():
        for version in VERSIONS:
            (place / name / version).mkdir(parents=True)
            integers.write(place / name / version, version, "float16")
    folders = [str(place / name / version) for name in models for version in VERSIONS]
    command = [sys.executable, "-I", "-c", SCRIPT, str(place / "found"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {key.removeprefix(f"{place}/"): value for key, value in load_file(place / "found").items()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_gptqmodel_has_the_codes(
    models: dict[str, Integers], found: dict[str, Tensor], name: str, version: str
) -> None:
    """Step and product are rounded to bfloat16, each by 2^-8 at most; another zero point would move even a weight of 0
    by a step."""
    integers = models[name]
    for linear in integers.codes:
        expected = integers.weight(linear, torch.float16)
        assert bool((expected == 0).any())
        torch.testing.assert_close(found[f"{name}/{version}:{linear}"], expected, rtol=2**-7 + 2**-15, atol=0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_gptqmodel_has_the_logits(
    models: dict[str, Integers], found: dict[str, Tensor], name: str, version: str
) -> None:
    with torch.no_grad():
        expected = models[name].model(torch.float16)(IDS).logits
    assert float((found[f"{name}/{version}"] - expected).norm() / expected.norm()) < 0.05

"""The folders that other tools read."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import save_tiny_model
from tiny_models import TinyFolder
from torch import Tensor

from qlora_pipe import layouts
from qlora_pipe.errors import WeightError
from qlora_pipe.exporters.dense import write_dense
from qlora_pipe.exporters.peft import write_peft

RANK = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def factors(base: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layout = layouts.adapter(TinyFolder(base).architecture, RANK)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in layout.items()}


def peft(folder: Path, base: Path, factors: dict[str, Tensor], *, strength: float, scale: float) -> Path:
    layout = layouts.peft_adapter(TinyFolder(base).architecture, RANK)
    write_peft(folder, layout, factors.__getitem__, base="org/model", rank=RANK, strength=strength, scale=scale)
    return folder


def test_peft_config_says_what_peft_needs(base: Path, factors: dict[str, Tensor], tmp_path: Path) -> None:
    peft(tmp_path, base, factors, strength=1.5, scale=1.0)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (RANK, 1.5 * RANK, 0.0, "none")
    assert config.lora_alpha / config.r == 1.5
    assert config.base_model_name_or_path == "org/model"
    assert config.task_type == "CAUSAL_LM"
    assert config.inference_mode
    assert not any((config.use_rslora, config.use_dora, config.fan_in_fan_out))
    projections = {f"{role}_proj" for role in ("q", "k", "v", "o", "gate", "up", "down")}
    assert set(config.target_modules) == projections


@pytest.mark.parametrize("scale", [1.0, 0.75, 0.0])
def test_recovery_scale_is_folded_into_b_alone(
    base: Path, factors: dict[str, Tensor], tmp_path: Path, scale: float
) -> None:
    peft(tmp_path, base, factors, strength=2.0, scale=scale)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert set(found) == {f"base_model.model.{name}" for name in factors}
    for name, tensor in factors.items():
        expected = tensor * scale if name.endswith("lora_B.weight") else tensor
        assert torch.equal(found[f"base_model.model.{name}"], expected), name
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 2.0 * RANK


def dense(folder: Path, base: Path, read: Callable[[str], Tensor], dtype: str) -> dict[str, Tensor]:
    tiny = TinyFolder(base)
    layout = layouts.dense(tiny.architecture, dtype)
    write_dense(folder, layout, read, config={"a": 1, "dtype": "float64"}, base=base, dtype=dtype)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_writes_base_plus_delta_in_the_dtype_asked_for(
    base: Path, factors: dict[str, Tensor], tmp_path: Path, dtype: str
) -> None:
    tiny = TinyFolder(base)

    def merged(tensor: str) -> Tensor:
        weight, stem = tiny.reader.read_float(tensor), tensor.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in factors:
            return weight
        return weight + 0.01 * factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]

    found = dense(tmp_path, base, merged, dtype)
    assert set(found) == set(tiny.architecture.tensors())
    for name, tensor in found.items():
        assert torch.equal(tensor, merged(name).to(getattr(torch, dtype))), name
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, tiny.reader.read(name).to(tensor))}
    assert changed == {f"{name}.weight" for _, _, name in tiny.architecture.linears()}
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1, "dtype": dtype}
    assert (tmp_path / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dense_holds_one_tensor_at_a_time(base: Path, tmp_path: Path, dtype: str) -> None:
    tiny = TinyFolder(base)
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        assert [ref for ref in alive if ref() is not None] == []
        tensor = tiny.reader.read_float(name)
        alive.append(weakref.ref(tensor))
        return tensor

    dense(tmp_path, base, read, dtype)
    assert len(alive) > 10


@pytest.mark.parametrize(
    ("dtype", "value", "fits"), [("float16", 7e4, False), ("bfloat16", 7e4, True), ("float16", 6e4, True)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_overflows_is_an_error(
    base: Path, tmp_path: Path, dtype: str, value: float, fits: bool, sign: int
) -> None:
    tiny, name = TinyFolder(base), "model.layers.1.mlp.down_proj.weight"

    def read(tensor: str) -> Tensor:
        weight = tiny.reader.read_float(tensor)
        if tensor == name:
            weight[-1, -1] = sign * value
        return weight

    if fits:
        assert dense(tmp_path, base, read, dtype)[name][-1, -1].item() == pytest.approx(sign * value, rel=1e-2)
        return
    with pytest.raises(WeightError, match=rf"tensor {name} overflows {dtype}; set export\.dtype to bfloat16"):
        dense(tmp_path, base, read, dtype)

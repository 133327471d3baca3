"""The folders that other tools read."""

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gptq_reader import read_map, read_stream
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import save_tiny_model
from tiny_integers import Integers
from tiny_models import TinyFolder
from torch import Tensor

from qlora_pipe import __version__, layouts
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


@pytest.fixture(scope="module")
def integers(base: Path) -> Integers:
    return Integers(base, {"down": 8, "q": 3, "v": 2})


@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq", "gptq_v2"])
def test_codes_are_handed_over_and_all_else_is_as_in_the_model(integers: Integers, tmp_path: Path, kind: str) -> None:
    change = integers.write(tmp_path, kind, "bfloat16")
    found, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert (tmp_path / "tokenizer.json").read_bytes() == (integers.base / "tokenizer.json").read_bytes()
    for name, codes in integers.codes.items():
        assert f"{name}.weight" not in found
        width, scale = integers.bits[name], integers.tensors[f"{name}.scale"]
        if kind == "compressed-tensors":
            assert (read_stream(found[f"{name}.weight_packed"], width) == codes.numpy()).all()
            assert torch.equal(found[f"{name}.weight_scale"], scale)
            continue
        stored, zeros, weight = read_map(found, name, width, kind)
        assert (stored == codes.numpy()).all()
        assert (zeros == 2 ** (width - 1)).all()
        exact = (codes.double() - 2 ** (width - 1)) * scale.double().repeat_interleave(32, dim=1)
        torch.testing.assert_close(torch.from_numpy(weight), exact, rtol=2**-11, atol=0)
    assert change is None or 1e-5 < change <= 2**-11
    for name in integers.tiny.architecture.others():
        assert torch.equal(found[name], integers.tiny.reader.read_float(name).bfloat16())


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_gptq_settings_say_what_differs(integers: Integers, tmp_path: Path, kind: str) -> None:
    integers.write(tmp_path, kind, "float32")
    settings = json.loads((tmp_path / "quantize_config.json").read_text())
    assert settings == json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    plain = {key: settings[key] for key in ("bits", "group_size", "sym", "desc_act", "lm_head", "checkpoint_format")}
    assert list(plain.values()) == [4, 32, True, False, False, kind]
    assert settings["meta"] == {"quantizer": [f"qlora_pipe:{__version__}"]}
    for name, width in integers.bits.items():
        rules = [rule for key, rule in settings["dynamic"].items() if re.match(key.removeprefix("+:"), name)]
        assert rules == ([{"bits": width}] if width != 4 else [])
    for other in ("model.layers.1.mlp.down_proj.lora", "model.layers.1.mlp_down_proj"):
        assert not any(re.match(key.removeprefix("+:"), other) for key in settings["dynamic"])


def test_a_step_without_a_half_is_refused(base: Path, tmp_path: Path) -> None:
    integers, name = Integers(base, {}), "model.layers.1.mlp.up_proj"
    integers.tensors[f"{name}.scale"][3, 1] = 1e-9
    with pytest.raises(WeightError, match=f"{name}: float16 has no step for 1e-09; take compressed-tensors"):
        integers.write(tmp_path, "gptq", "float32")

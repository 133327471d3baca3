"""Models built from our own linear maps against those that stock transformers loads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipeline.test_chain import FAMILIES
from tiny import save_tiny_model
from tiny_models import TinyFolder
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from prune.groups import PRUNED_AXIS, ROLES, LayerShape
from prune.indexmap import IndexMap, LayerKept
from prune.slice import slice_bias, slice_rows_or_columns
from qlora_pipe.errors import DeviceError, SourceError
from qlora_pipe.hf.model import AdaptedLinear, Model, check_device, dense_linear, set_strength, small_config

IDS = torch.arange(2 * 50).reshape(2, 50) * 7 % 256


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def save(folder: Path, family: str) -> TinyFolder:
    return TinyFolder(save_tiny_model(folder, family.partition("-")[0], **FAMILIES[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_maps_give_the_stock_logits_bit_for_bit(family: str, tmp_path: Path) -> None:
    ours = save(tmp_path, family).dense()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(stock))
    assert {name: value.shape for name, value in ours.named_parameters()} == {
        name: value.shape for name, value in stock.named_parameters()
    }
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def sliced(tiny: TinyFolder, kept: IndexMap) -> Model:
    def linear(layer: int, role: str, name: str) -> nn.Module:
        weight, bias = tiny.weight(role, name)
        indices = kept.kept_indices(layer, role)
        if bias is not None and PRUNED_AXIS[role] == "rows":
            bias = slice_bias(bias, role, indices)
        return dense_linear(slice_rows_or_columns(weight, role, indices), bias)

    layers = kept.kept_shapes
    return tiny.build(linear, replace(tiny.architecture, layers=layers))


def masked(tiny: TinyFolder, kept: IndexMap) -> Model:
    """The full model in which nothing reads the groups that are not kept."""

    def linear(layer: int, role: str, name: str) -> nn.Module:
        weight, bias = tiny.weight(role, name)
        if PRUNED_AXIS[role] == "columns":
            mask = torch.zeros(weight.shape[1])
            mask[kept.kept_indices(layer, role)] = 1
            weight = weight * mask
        return dense_linear(weight, bias)

    return tiny.build(linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_different_widths_equal_the_masked_model(family: str, tmp_path: Path) -> None:
    """Tolerance 1e-5 of the largest logit: the same sums in another order."""
    tiny = save(tmp_path, family)
    shapes = tiny.architecture.layers
    kept = IndexMap((LayerKept((1,), tuple(range(5, 101))), LayerKept((0, 1), tuple(range(0, 192, 6)))), shapes)
    small, full = logits(sliced(tiny, kept)), logits(masked(tiny, kept))
    torch.testing.assert_close(small, full, rtol=0, atol=1e-5 * full.abs().max().item())
    assert (full - logits(tiny.dense())).abs().max() > 1e-2 * full.abs().max(), "the mask does something"


@pytest.mark.parametrize("family", FAMILIES)
def test_small_config_is_what_stock_transformers_needs(family: str, tmp_path: Path) -> None:
    tiny = save(tmp_path, family)
    kept = IndexMap(
        (LayerKept((1,), tuple(range(32))), LayerKept((0,), tuple(range(160, 192)))), tiny.architecture.layers
    )
    small = sliced(tiny, kept)
    architecture = replace(tiny.architecture, layers=(kept.kept_shape(0), kept.kept_shape(1)))
    # Many folders leave head_dim to the default, hidden / heads: no longer right with fewer heads.
    config = small_config({key: value for key, value in tiny.config.items() if key != "head_dim"}, architecture)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stock.load_state_dict(small.state_dict())
    assert torch.equal(logits(stock.eval()), logits(small))


def test_small_config_refuses_unequal_widths(tmp_path: Path) -> None:
    tiny = save(tmp_path, "llama")
    narrow = LayerShape(hidden=64, heads=2, kv_heads=1, head_dim=16, ffn=192)
    architecture = replace(tiny.architecture, layers=(tiny.architecture.layers[0], narrow))
    with pytest.raises(SourceError, match="needs equal widths in every layer"):
        small_config(tiny.config, architecture)


def test_build_refuses_a_parameter_the_description_lacks(tmp_path: Path) -> None:
    tiny = save(tmp_path, "llama-bias")
    untied = replace(tiny.architecture, tied=True)
    with pytest.raises(SourceError, match=r"parameter lm_head\.weight .* is not in the architecture description"):
        tiny.build(lambda layer, role, name: dense_linear(*tiny.weight(role, name)), untied)


def test_adapted_linear_adds_the_scaled_product() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weight, bias, lora_a, lora_b, x = draw(6, 5), draw(6), draw(2, 5), draw(6, 2), draw(3, 5)
    model = nn.Sequential(AdaptedLinear(dense_linear(weight, bias), lora_a, lora_b, 0.5))
    torch.testing.assert_close(model(x), x @ (weight + 0.5 * lora_b @ lora_a).T + bias, rtol=1e-5, atol=1e-5)
    set_strength(model, 0.0)
    assert torch.equal(model(x), dense_linear(weight, bias)(x))


def test_dense_linear_copies_nothing() -> None:
    weight, bias = torch.ones(3, 2), torch.ones(3)
    module = dense_linear(weight, bias)
    assert (module.weight.data_ptr(), module.bias.data_ptr()) == (weight.data_ptr(), bias.data_ptr())
    assert dense_linear(weight, None).bias is None


def test_every_role_is_replaced(tmp_path: Path) -> None:
    tiny = save(tmp_path, "qwen2")
    seen = []

    def linear(layer: int, role: str, name: str) -> nn.Module:
        seen.append((layer, role))
        return dense_linear(*tiny.weight(role, name))

    tiny.build(linear)
    assert seen == [(layer, role) for layer in range(2) for role in ROLES]


def test_check_device() -> None:
    assert check_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "abacus"):
        with pytest.raises(DeviceError, match=f"device '{name}': expected a device of this machine"):
            check_device(name)
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES"):
        check_device("cpu:1")

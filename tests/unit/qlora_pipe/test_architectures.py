import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SIZES, save_tiny_model

from qlora_pipe.architectures import FAMILIES, Architecture, check_tensors, from_config
from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.errors import UnsupportedModel
from qlora_pipe.sources import architecture_of, find_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("mistral", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
}
LLAMA = {"model_type": "llama", **SIZES}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, changes = MODELS[request.param]
    return save_tiny_model(tmp_path_factory.mktemp(request.param), model_type, **changes)


def test_every_tensor_of_a_checkpoint_is_described(folder: Path) -> None:
    found = {name: place.spec.shape for name, place in read_folder(folder).items()}
    assert architecture_of(find_model(str(folder))).tensors() == found


def test_linear_maps_and_others_share_out_the_checkpoint(folder: Path) -> None:
    architecture = architecture_of(find_model(str(folder)))
    tensors = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    linears = [name for _, _, name in architecture.linears()]
    assert len(linears) == 7 * SIZES["num_hidden_layers"]
    assert architecture.linear_weights() == sum(tensors[f"{name}.weight"] for name in linears)
    of_linears = {name for name in tensors if name.rpartition(".")[0] in linears}
    assert set(architecture.others()) == set(tensors) - of_linears


@pytest.mark.parametrize("family", [name for row in FAMILIES for name in row.model_types])
@pytest.mark.parametrize("left_out", ["head_dim", "tie_word_embeddings"])
def test_what_a_config_leaves_out_is_what_transformers_assumes(family: str, left_out: str) -> None:
    from transformers import AutoConfig

    sizes = {name: value for name, value in SIZES.items() if name != left_out}
    theirs, ours = AutoConfig.for_model(family, **sizes), from_config({"model_type": family, **sizes})
    expected = theirs.head_dim if hasattr(theirs, "head_dim") else theirs.hidden_size // theirs.num_attention_heads
    assert ours.layers[0].head_dim == expected
    assert ours.tied == theirs.tie_word_embeddings


def test_sizes_are_read() -> None:
    shape = from_config(LLAMA).layers[1]
    assert (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn) == (64, 4, 2, 16, 192)
    without = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "head_dim")}
    assert from_config(without).layers[0].kv_heads == 4
    assert from_config(without | {"num_attention_heads": 8}).layers[0].head_dim == 8


@pytest.mark.parametrize("kind", ["mixtral", "gemma3", "llama4", None, 7, ["llama"]])
def test_other_families_are_refused_by_name(kind: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type .* is not supported; supported are llama, mistral, qwen2"):
        from_config(LLAMA | {"model_type": kind})


@pytest.mark.parametrize(
    "size", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_a_config_without_a_size_names_it(size: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"found no '{size}'"):
        from_config({name: value for name, value in LLAMA.items() if name != size})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, "expected sizes as numbers"),
        ({"vocab_size": None}, "expected sizes as numbers"),
        ({"vocab_size": [1]}, "expected sizes as numbers"),
        ({"intermediate_size": math.inf}, "expected sizes as numbers"),
        ({"intermediate_size": math.nan}, "expected sizes as numbers"),
        ({"num_attention_heads": 0, "head_dim": None}, "expected sizes as numbers"),
        ({"num_attention_heads": 0}, "not a model"),
        ({"num_key_value_heads": 3}, "4 heads on 3 KV heads"),
        ({"num_key_value_heads": -2}, "not a model"),
        ({"num_hidden_layers": 0}, "0 layers: not a model"),
        ({"num_hidden_layers": 10**15}, "layers: not a model"),
        ({"hidden_size": -64}, "not a model"),
    ],
)
def test_impossible_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        from_config(LLAMA | changes)


@pytest.fixture
def llama() -> Architecture:
    return from_config(LLAMA)


def test_a_missing_an_odd_and_a_misshapen_tensor(llama: Architecture) -> None:
    whole, name = llama.tensors(), "model.layers.1.mlp.up_proj.weight"
    check_tensors(llama, whole)
    with pytest.raises(UnsupportedModel, match=f"the checkpoint has no tensor {name}"):
        check_tensors(llama, {key: shape for key, shape in whole.items() if key != name})
    with pytest.raises(UnsupportedModel, match=rf"{name}: config.json implies shape \(192, 64\), found \(64, 192\)"):
        check_tensors(llama, whole | {name: (64, 192)})
    odd = {f"model.layers.0.self_attn.{role}_proj.bias": (32,) for role in "kv"}
    with pytest.raises(
        UnsupportedModel, match=r"2 tensors that .* does not explain, first model.layers.0.self_attn.k_"
    ):
        check_tensors(llama, whole | odd)


def test_a_head_beside_tied_embeddings_and_rotary_buffers_are_known(llama: Architecture) -> None:
    assert llama.tied
    check_tensors(llama, llama.tensors() | {"lm_head.weight": (260, 64), "model.rotary_emb.inv_freq": (8,)})
    untied = from_config(LLAMA | {"tie_word_embeddings": False})
    with pytest.raises(UnsupportedModel, match=r"no tensor lm_head.weight"):
        check_tensors(untied, llama.tensors())


def test_a_folder_is_checked_against_its_config(tmp_path: Path) -> None:
    architecture = from_config(LLAMA)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    tensors = {name: torch.zeros(shape) for name, shape in architecture.tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert architecture_of(find_model(str(tmp_path))) == architecture
    save_file(tensors | {"model.layers.0.mlp.router.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="router"):
        architecture_of(find_model(str(tmp_path)))


def test_linear_shapes_give_the_widths_back(llama: Architecture) -> None:
    first, second = llama.layers
    small = llama.with_layers((first, replace(second, heads=2, kv_heads=1, ffn=32)))
    assert llama.with_linear_shapes(small.linear_shapes()) == small
    last = {name: sides for name, sides in small.linear_shapes().items() if name.startswith("model.layers.1.")}
    assert llama.with_linear_shapes(last) == small
    assert llama.with_linear_shapes({}) == llama


@pytest.mark.parametrize(
    ("name", "sides", "message"),
    [
        ("model.layers.0.self_attn.q_proj", (48, 64), r"q_proj: expected sides \[64, 64\], .* found \[48, 64\]"),
        ("model.layers.0.self_attn.k_proj", (16, 64), r"q_proj: expected sides \[32, 64\]"),
        ("model.layers.0.self_attn.k_proj", (24, 64), "expected sides"),
        ("model.layers.0.self_attn.k_proj", (8, 64), "layer 0 cannot have .*heads must be a positive integer"),
        ("model.layers.1.mlp.gate_proj", (96, 64), r"layers.1.mlp.up_proj: expected sides \[96, 64\]"),
        ("model.layers.1.mlp.down_proj", (64, 96), r"down_proj: expected sides \[64, 192\]"),
        ("model.layers.1.mlp.up_proj", (192, 32), r"up_proj: expected sides \[192, 64\]"),
        ("model.layers.2.mlp.up_proj", (192, 64), "found none of that name"),
        ("lm_head", (100, 64), "lm_head: expected a linear map of a block"),
    ],
)
def test_linear_shapes_of_no_pruned_layer(llama: Architecture, name: str, sides: tuple[int, int], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        llama.with_linear_shapes({name: sides})

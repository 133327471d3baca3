"""Which formats hold the integer model, and what is said of those that do not, before anything runs."""

from typing import Any

import pytest
from pydantic import ValidationError
from tiny import SIZES

from qlora_pipe.architectures import from_config
from qlora_pipe.artifacts.layout import file_bytes
from qlora_pipe.config import Config
from qlora_pipe.errors import ConfigError
from qlora_pipe.gguf_layout import gguf_bytes
from qlora_pipe.known import Known, estimate_allocation
from qlora_pipe.shapes import check_shapes

QWEN = SIZES | {"model_type": "qwen2"}
PRUNE = {"kv_ratio": 0.0, "ffn_ratio": 0.3, "align": 32}
ALLOCATED = {"ratio": 0.2, "widths": "allocated", "align": 32}


def knowing(model: dict[str, Any] = QWEN, **changes: Any) -> Known:
    settings: dict[str, Any] = {"prune": PRUNE, "compact": {"group_size": 32}} | changes
    body = {
        "model": "owner/name",
        "data": {"calibration": "a.txt", "task": "b.txt"},
        "decompose": {"bits": (2, 4), "block_sizes": (16, 32), "ranks": (0,), "budget": "6bits"},
    }
    config, architecture = Config.model_validate(body | settings), from_config(model)
    return Known(config, architecture, {}, estimate_allocation(architecture, {}, config), True)


def compact(**changes: Any) -> dict[str, Any]:
    return {"compact": {"group_size": 32} | changes}


def prune(**changes: Any) -> dict[str, Any]:
    return {"prune": PRUNE | changes}


LLAMA = QWEN | {"model_type": "llama"}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("every", compact(bits=2), "code 0 of 2 bits stands for half a step.*set compact.offset to zero"),
    ("every", compact(rules=[{"roles": ["v"], "bits": 2}]), "code 0 of 2 bits stands for half a step"),
    ("every", compact(offset="half"), "code 0 of 4 bits stands for half a step"),
    ("every", compact(offset="trained"), "stands for a trained number"),
    ("every", compact(method="qat-lora"), "no place for the adapter.*set compact.method to l4q"),
    ("every", compact(method="qa-lora"), "a number that qa-lora trains.*set compact.method to l4q"),
    ("every", prune(protect_last=1), "may differ in width.*prune.protect_last to 0"),
    ("every", {"prune": ALLOCATED}, "may differ in width.*prune.widths to uniform"),
    ("every", prune(bias=True), "a qwen2 model has no place for the biases.*set prune.bias to false"),
    ("gptq", compact(group_size=8), "groups of 16, 32, 64, .*, not of 8"),
    ("gptq", prune(align=16, ffn_ratio=0.25) | compact(group_size=16), r"gate_proj is \[144, 64\].*compressed-tensors"),
]


@pytest.mark.parametrize(("which", "changes", "says"), CASES)
def test_what_cannot_hold_it_is_refused_or_left_out(which: str, changes: dict[str, Any], says: str) -> None:
    left = knowing(**changes)
    check_shapes(left.architecture, left.config)
    for name in ("compressed-tensors", "gptq", "gptq_v2") if which == "every" else ("gptq", "gptq_v2"):
        asked = knowing(**changes, export={"integer": [name]})
        with pytest.raises(ConfigError, match=f"export.integer: {name} cannot hold the integer model: .*{says}"):
            check_shapes(asked.architecture, asked.config)
    reason = left.integer_formats["compressed-tensors"]
    assert (reason is None) == (which != "every")
    assert ("compressed-tensors/model" in left.outputs("export")) == (reason is None)


@pytest.mark.parametrize(
    "changes", [{}, compact(bits=2, offset="zero"), compact(rules=[{"roles": ["down"], "bits": 3}])]
)
def test_what_holds_it_is_planned(changes: dict[str, Any]) -> None:
    known = knowing(**changes, export={"integer": ["gptq", "compressed-tensors", "gptq"], "dtype": "bfloat16"})
    check_shapes(known.architecture, known.config)
    assert known.integer_formats == {"gptq": None, "compressed-tensors": None}
    tensors = known.exported_integers("gptq")
    assert known.files("export")["gptq/model.safetensors"] == file_bytes(tensors)
    assert tensors["model.layers.0.self_attn.q_proj.bias"].dtype == "F16"
    assert tensors["model.norm.weight"].dtype == "BF16"
    name = "model.layers.1.mlp.down_proj"
    width, (rows, columns) = known.integer_bits[name], known.small.linear_shapes()[name]
    paid = {"gptq": width + (16 + width) / 32 + 32 / rows, "compressed-tensors": width + 32 / 32 + 128 / rows / columns}
    for kind, bits in paid.items():
        layout = known.exported_integers(kind)
        stored = sum(spec.nbytes for tensor, spec in layout.items() if tensor.startswith(f"{name}."))
        assert 8 * stored / rows / columns == pytest.approx(bits)


def test_the_default_is_the_exact_one_and_can_be_switched_off() -> None:
    assert knowing().integer_formats == {"compressed-tensors": None}
    assert knowing(export={"integer": []}).integer_formats == {}
    assert knowing(compact={"enabled": False}).integer_formats == {}


def test_formats_need_an_integer_model() -> None:
    with pytest.raises(ValidationError, match=r"gptq is a format of the integer model.*export.integer to \[\]"):
        knowing(compact={"enabled": False}, export={"integer": ["gptq"]})


GGUF: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (QWEN, compact(bits=2), "no matrices of 2 bits .*only of 4 and 8: set compact.bits and the rules of compact to 4"),
    (QWEN, compact(rules=[{"roles": ["v"], "bits": 3}]), "no matrices of 3 bits"),
    (QWEN, compact(group_size=16), "blocks are of 32 weights: set compact.group_size to a multiple"),
    (QWEN, compact(bits=8, offset="half"), "code 0 of 8 bits stands for half a step.*compact.offset to zero"),
    (QWEN, compact(method="qat-lora"), "no place for the adapter.*set compact.method to l4q"),
    (QWEN, compact(bits=8, method="qa-lora"), "a number that qa-lora trains.*set compact.method to l4q"),
    (QWEN, prune(protect_last=1), "may differ in width.*prune.protect_last to 0"),
    (QWEN, prune(bias=True), "no place for the biases.*set prune.bias to false"),
    (QWEN, prune(kv_ratio=0.5), "heads of a qwen2 model for 64/2 wide: set prune.kv_ratio to 0"),
    (QWEN | {"model_type": "gemma2"}, {}, "a gemma2 model is not known here, of llama, qwen2, qwen3 it is"),
    (QWEN | {"model_type": "mistral"}, {}, "a mistral model is not known here"),
    (
        QWEN | {"model_type": "qwen3", "head_dim": 16},
        {},
        "heads of a qwen3 model for 128 wide: take compressed-tensors",
    ),
    (LLAMA | {"attention_bias": True}, {}, "leave out the biases of this llama model: take compressed-tensors"),
]


@pytest.mark.parametrize(("model", "changes", "says"), GGUF)
def test_what_gguf_cannot_hold_is_refused(model: dict[str, Any], changes: dict[str, Any], says: str) -> None:
    asked = knowing(model, **changes, export={"integer": ["gguf"]})
    with pytest.raises(ConfigError, match=f"export.integer: gguf cannot hold the integer model: .*{says}"):
        check_shapes(asked.architecture, asked.config)


@pytest.mark.parametrize(
    ("changes", "paid"),
    [
        ({}, 4.5),
        (compact(offset="half"), 5.0),
        (compact(offset="trained"), 5.0),
        (compact(method="qa-lora"), 5.0),
        (compact(bits=8), 8.5),
        (compact(group_size=64), 4.5),
    ],
)
def test_what_gguf_holds_is_planned(changes: dict[str, Any], paid: float) -> None:
    known = knowing(LLAMA, **{"prune": PRUNE | {"align": 64}} | changes, export={"integer": ["gguf"]})
    check_shapes(known.architecture, known.config)
    layout = known.exported_integers("gguf")
    rows, columns = known.small.linear_shapes()["model.layers.1.mlp.down_proj"]
    assert 8 * layout["blk.1.ffn_down.weight"].nbytes / rows / columns == paid
    # Without a folder there is no tokenizer to count, and nothing to say.
    assert known.files("export")["gguf/model.gguf"] == gguf_bytes(layout, {})


NF4 = {"bits": (4,), "grids": ("nf",), "block_sizes": (32,), "ranks": (0,), "budget": "6bits"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decompose": NF4 | {"grids": ("lloyd",)}}, r"no levels of .*lloyd.*decompose.grids to \[nf\]"),
        ({"decompose": NF4 | {"bits": (3, 4)}}, r"no codes of \(3, 4\) bits: set decompose.bits to \[4\]"),
        ({"decompose": NF4 | {"block_sizes": (16, 32, 192)}}, r"no blocks of \[16, 192\]: set decompose.block_sizes"),
        ({"decompose": NF4, "refine": {"enabled": True}}, "no levels that refine moved: set refine.enabled to false"),
    ],
)
def test_what_bitsandbytes_cannot_hold_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=f"bitsandbytes has NormalFloat levels at 4 bits, and {says}"):
        knowing(**changes, export={"packed": ["bitsandbytes"]})


def test_what_bitsandbytes_holds_is_planned() -> None:
    known = knowing(decompose=NF4, export={"packed": ["bitsandbytes", "bitsandbytes"], "dtype": "bfloat16"})
    layout = known.outputs("export")["bitsandbytes/model"]
    assert known.files("export")["bitsandbytes/model.safetensors"] == file_bytes(layout)
    assert "bitsandbytes/adapter/adapter_model" not in known.outputs("export")
    for name, (rows, columns) in known.architecture.linear_shapes().items():
        stored = sum(spec.nbytes for tensor, spec in layout.items() if tensor.startswith(f"{name}.weight"))
        if name.endswith(("o_proj", "down_proj")):
            assert stored == 2 * rows * columns
        else:
            # A code and its share of a scale; the levels, and the JSON of the sides.
            assert 0 < stored - (4 + 32 / 32) * rows * columns / 8 - 64 < 100

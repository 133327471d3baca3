"""Counts of single entries from shapes, LoRAM's published ones among them; what is planned and told of them."""

import math
from typing import Any

import pytest
from tiny import SIZES

from prune.groups import LayerShape
from qlora_pipe.architectures import FAMILIES, Architecture, from_config
from qlora_pipe.artifacts.layout import file_bytes
from qlora_pipe.config import Config
from qlora_pipe.config_sparsity import Sparsity
from qlora_pipe.errors import ConfigError
from qlora_pipe.known import Known, estimate_allocation
from qlora_pipe.memory import peak_bytes
from qlora_pipe.shapes import check_shapes
from qlora_pipe.sparsity import nonzero_parameters, record, rows
from quant.storage import Choice

LLAMA_13B = Architecture(
    "llama",
    FAMILIES[0],
    32000,
    (LayerShape(hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=13824),) * 40,
    False,
    frozenset(),
)
TINY = {"model_type": "qwen2", **SIZES}


def settings(pattern: str, **changes: Any) -> Sparsity:
    return Sparsity.model_validate({"pattern": pattern, **changes})


def config(pattern: str | None, **changes: Any) -> Config:
    plain: dict[str, Any] = {
        "model": "owner/name",
        "data": {"calibration": "a.txt", "task": "b.txt"},
        "decompose": {"block_sizes": (16, 32), "ranks": (0, 4), "budget": "6bits"},
        "prune": {"kv_ratio": 0.0, "ffn_ratio": 0.0} if pattern is None else {"sparsity": {"pattern": pattern}},
        "compact": {"enabled": False},
    }
    for key, value in changes.items():
        plain[key] = {**plain.get(key, {}), **value}
    return Config.model_validate(plain)


def knowing(pattern: str | None, **changes: Any) -> Known:
    tiny, chosen = from_config(TINY), config(pattern, **changes)
    return Known(chosen, tiny, {}, estimate_allocation(tiny, {}, chosen), False)


def test_the_published_count_of_loram_unst() -> None:
    """arXiv 2502.13533, LLaMA-2-13B at 55 %: published are 37,872 parameters more than 55 % of all linear maps leave,
    6e-6 of them; with a layer protected it would be 174 million."""
    found = nonzero_parameters(LLAMA_13B, settings("unstructured"))
    assert found == 6_037_591_040
    assert 0 <= 6_037_628_912 - found < 38_000
    whole = nonzero_parameters(LLAMA_13B, settings("none"))
    assert whole == 13_015_864_320
    assert round(whole / found, 2) == 2.16


def test_the_count_of_loram_semi() -> None:
    """What 4:8 leaves; it gives the ratio that is published, unlike the count that is published beside it, which is
    that of another model."""
    for pattern in ("4:8", "2:4"):
        found = nonzero_parameters(LLAMA_13B, settings(pattern))
        assert found == 6_671_979_520
        assert round(13_015_864_320 / found, 2) == 1.95


def test_inputs_must_split_into_groups() -> None:
    odd = from_config(TINY | {"intermediate_size": 180})
    check_shapes(odd, config("2:4"))
    with pytest.raises(
        ConfigError, match=r"4:8 needs inputs in groups of 8, and model\.layers\.0\.mlp\.down_proj has 180"
    ):
        check_shapes(odd, config("4:8"))
    check_shapes(odd, config("unstructured"))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_no_shape_and_no_byte_of_the_model_changes(pattern: str) -> None:
    """Superblocks that span rows stay as well: no row goes."""
    known, plain = knowing(pattern, decompose={"superblocks": (8,)}), knowing(None, decompose={"superblocks": (8,)})
    assert known.small == known.architecture
    assert known.pruned() == known.decomposed()
    assert plain.pruned() != plain.decomposed()
    assert known.is_final is False
    for layer, role, _ in known.architecture.linears():
        assert known.packed_shape("prune", layer, role) == known.packed_shape("decompose", layer, role)


def test_masks_are_planned_a_bit_an_entry() -> None:
    known = knowing("2:4")
    layout = known.outputs("select")["masks"]
    bits = sum(8 * spec.nbytes for spec in layout.values())
    assert bits == known.architecture.linear_weights()
    assert known.files("select") == {"masks.safetensors": file_bytes(layout)}
    assert knowing(None).files("select") == {}


def test_what_is_read_and_held_in_memory() -> None:
    sparse, plain = knowing("2:4"), knowing(None)
    size = {stage: sum(sparse.files(stage).values()) for stage in ("calibrate", "decompose", "select")}
    assert sparse.reads("select") == plain.reads("select") + sparse.base_bytes()
    assert sparse.reads("prune") == sum(size.values()) + sparse.base_bytes()
    assert plain.reads("prune") == size["decompose"]
    for stage in ("select", "prune"):
        # A covariance twice in fp32 and three matrices of its factorisation in fp64, of the 192 inputs of down.
        assert peak_bytes(stage, sparse)[0] - peak_bytes(stage, plain)[0] == 32 * 192**2


def test_what_is_recorded_and_told() -> None:
    tiny = from_config(TINY)
    zeros = {name: out * columns // 2 for name, (out, columns) in tiny.linear_shapes().items()}
    first = next(iter(zeros))
    zeros[first] -= 41
    body = record(zeros, tiny, settings("2:4", by="wanda"), "1" * 64, "2" * 64)
    total = sum(math.prod(shape) for shape in tiny.tensors().values())
    assert body["parameters"] == {"model": total, "nonzero": total - tiny.linear_weights() // 2 + 41}
    assert body["true_sparsity"] == pytest.approx(0.5 - 41 / tiny.linear_weights())
    assert body["matrices"][first] == {"weights": 4096, "zeros": 2007, "sparsity": 2007 / 4096}
    told = dict(rows(body))
    assert told["pattern"] == "2:4, by wanda"
    assert told["zeros in Q"].endswith("49.00 to 50.00 % of a matrix")
    assert told["nonzero parameters"].startswith(f"{body['parameters']['nonzero']:,} of {total:,}")
    zeros[first] += 41
    assert dict(rows(record(zeros, tiny, settings("2:4"), "", "")))["zeros in Q"].endswith("every matrix alike")


def test_the_allocation_is_left_as_it_is() -> None:
    known = knowing("unstructured")
    across = {name: Choice("nf", 3, 16, 0, superblock=8) for name in known.allocation}
    assert known.with_allocation(across).small_allocation == across

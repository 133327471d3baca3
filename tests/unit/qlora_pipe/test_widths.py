"""Widths from shapes alone: nominal ratios, true reductions, and what cannot be had."""

import math
from typing import Any

import pytest

from prune.counting import counts_without
from prune.groups import LayerShape
from qlora_pipe.architectures import FAMILIES, Architecture
from qlora_pipe.config import Prune
from qlora_pipe.errors import ConfigError
from qlora_pipe.widths import group_sizes, parameters_to_go, reduction, small_architecture

SHAPE = LayerShape(hidden=64, heads=8, kv_heads=4, head_dim=16, ffn=256)


def architecture(layers: int = 4, biased: str = "", shape: LayerShape = SHAPE) -> Architecture:
    return Architecture("llama", FAMILIES[0], 100, (shape,) * layers, True, frozenset(biased))


def settings(**values: Any) -> Prune:
    return Prune.model_validate(values)


def true_reduction(model: Architecture, **values: Any) -> float:
    return reduction(model.block_parameters(), small_architecture(model, settings(**values)).block_parameters())


@pytest.mark.parametrize("biased", ["", "qkv"])
def test_parameters_of_groups_add_up_to_the_tensors(biased: str) -> None:
    model = architecture(biased=biased)
    sizes = group_sizes(model, 0)
    for kind, narrower in (("kv", {"kv_heads": 3, "heads": 6}), ("ffn", {"ffn": 255})):
        fewer = model.with_layers([LayerShape(**{**vars(SHAPE), **narrower}), *model.layers[1:]])
        assert model.block_parameters() - fewer.block_parameters() == sizes[kind]


LLAMA_70B = LayerShape(hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672)
PUBLISHED = {
    "llama2-13b": (LayerShape(hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=13824), 40, 32000),
    "llama2-70b": (LLAMA_70B, 80, 32000),
    "llama3.1-70b": (LLAMA_70B, 80, 128256),
}


def published(name: str, ratio: float) -> int:
    """All parameters of a public model after LoRAM's pruning at a nominal ratio."""
    shape, layers, vocab = PUBLISHED[name]
    model = Architecture("llama", FAMILIES[0], vocab, (shape,) * layers, False, frozenset())
    small = small_architecture(model, settings(preset="loram", kv_ratio=ratio, ffn_ratio=ratio))
    return sum(math.prod(tensor) for tensor in small.tensors().values())


@pytest.mark.parametrize(
    ("name", "ratio", "count"),
    [
        ("llama2-13b", 0.0, 13_015_864_320),
        ("llama2-70b", 0.0, 68_976_648_192),
        ("llama3.1-70b", 0.0, 70_553_706_496),
        ("llama2-13b", 0.65, 6_005_662_720),
        ("llama2-70b", 0.65, 28_099_436_544),
        ("llama2-70b", 0.75, 21_488_738_304),
        ("llama2-70b", 0.85, 16_272_924_672),
        ("llama2-70b", 0.95, 9_662_226_432),
        ("llama3.1-70b", 0.85, 17_849_982_976),
    ],
)
def test_the_published_counts_of_loram(name: str, ratio: float, count: int) -> None:
    """arXiv 2502.13533, every structured row."""
    assert published(name, ratio) == count


@pytest.mark.parametrize(
    ("name", "printed", "with_constants", "with_embeddings"),
    [("llama2-70b", 16.95, 16.43, 15.04), ("llama3.1-70b", 15.81, 15.32, 11.45)],
)
def test_the_published_reductions_of_qloram(
    name: str, printed: float, with_constants: float, with_embeddings: float
) -> None:
    """As printed they count four bits for every parameter, embeddings and head too, and no constants."""
    shape, _, vocab = PUBLISHED[name]
    whole, small = published(name, 0.0), published(name, 0.85)
    stored = 4 + 8 / 64 + 32 / (64 * 256)  # NF4, blocks of 64, 8-bit absmax in groups of 256
    ends = 2 * vocab * shape.hidden  # embedding and head stay in 16 bits
    assert round(whole * 16 / (small * 4), 2) == printed
    assert round(whole * 16 / (small * stored), 2) == with_constants
    assert round(whole * 16 / ((small - ends) * stored + ends * 16), 2) == with_embeddings


def test_rules_of_loram_are_of_one_nominal_ratio() -> None:
    with pytest.raises(ValueError, match="one nominal ratio"):
        settings(preset="loram", kv_ratio=0.5, ffn_ratio=0.25)
    with pytest.raises(ValueError, match="one nominal ratio"):
        settings(preset="loram", ratio=0.25)
    model = architecture(8)
    with pytest.raises(ConfigError, match=r"prune: ratio 0\.9 would keep 0 KV heads"):
        small_architecture(
            model.with_layers([LayerShape(64, 4, 4, 16, 256)] * 8),
            settings(preset="loram", kv_ratio=0.9, ffn_ratio=0.9),
        )


def test_the_reference_value_of_llama_7b() -> None:
    """25 % of heads and channels of 26 of 32 layers leave 5,422,977,024 of 6,738,415,616 parameters (loraprune.md)."""
    shape = LayerShape(hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008)
    model = Architecture("llama", FAMILIES[0], 32000, (shape,) * 32, False, frozenset())
    outside = 2 * 32000 * 4096 + 4096
    assert model.block_parameters() + outside == 6_738_415_616
    nominal = settings(kv_ratio=0.25, ffn_ratio=0.25, protect_first=4, protect_last=2)
    small = small_architecture(model, nominal)
    assert small.block_parameters() + outside == 5_422_977_024
    # Asked for the other way round, it gives the same widths.
    ratio = reduction(model.block_parameters(), small.block_parameters())
    asked = settings(ratio=int(ratio * 1e6) / 1e6, protect_first=4, protect_last=2)
    assert small_architecture(model, asked).layers == small.layers


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.25, 0.5, 0.77])
@pytest.mark.parametrize("protect", [0, 1])
def test_the_true_reduction_is_never_below_and_less_than_a_unit_above(ratio: float, protect: int) -> None:
    model = architecture(5, "qkv")
    if ratio > 0.6 and protect:
        pytest.skip("more than the layers that are left can give")
    given = {"ratio": ratio, "align": 8, "protect_first": protect}
    found = true_reduction(model, **given)
    free = 5 - protect
    unit = free * 8 * group_sizes(model, 0)["ffn"]
    assert ratio <= found < ratio + unit / model.block_parameters()
    small = small_architecture(model, settings(**given))
    assert small.layers[:protect] == model.layers[:protect]
    assert len(set(small.layers[protect:])) == 1


def test_nothing_goes_at_ratio_zero_and_nominal_ratios_are_not_read() -> None:
    model = architecture()
    assert small_architecture(model, settings(ratio=0, kv_ratio=0.5)).layers == model.layers
    assert small_architecture(model, settings(ratio=0, protect_first=9)).layers == model.layers
    assert settings(ratio=0).removes is False
    assert settings(kv_ratio=0.0, ffn_ratio=0.0).removes is False
    assert settings(kv_ratio=0.5, ffn_ratio=0.0).removes is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"ratio": 0.9},
            r"prune.ratio 0.9 would empty layers: one KV group and 64 FFN .* works is 0.7\d+",
        ),
        (
            {"ratio": 0.7, "protect_first": 1, "protect_last": 1},
            r"protected layers and norms take .* works is 0.3\d+",
        ),
        ({"ratio": 0.1, "protect_first": 4}, "protect_first 4 and prune.protect_last 0 cover all 4 layers"),
        ({"ffn_ratio": 0.1, "protect_last": 5}, "protect_first 0 and prune.protect_last 5 cover all 4 layers"),
        ({"ffn_ratio": 0.999}, "prune.ffn_ratio: ratio 0.999 would remove all"),
    ],
)
def test_what_cannot_be_had(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_architecture(architecture(), settings(**given))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("protect", [0, 1])
def test_the_largest_ratio_that_works_works(protect: int, bias: bool) -> None:
    given = {"protect_first": protect, "bias": bias}
    with pytest.raises(ConfigError) as refused:
        small_architecture(architecture(), settings(ratio=0.99, **given))
    largest = float(str(refused.value).rpartition(" ")[2])
    assert true_reduction(architecture(), ratio=largest, **given) >= largest
    with pytest.raises(ConfigError):
        small_architecture(architecture(), settings(ratio=largest + 1e-5, **given))


def test_a_ratio_is_the_decimal_it_prints_as() -> None:
    model = architecture(10)
    wanted = parameters_to_go(model, settings(ratio=0.1))
    assert wanted == model.block_parameters() // 10
    assert parameters_to_go(model, settings(ratio=0.3)) == 3 * wanted
    # A parameter is whole: of what is asked for nothing is left out.
    assert parameters_to_go(model, settings(ratio=0.1000001)) == wanted + 1


def test_one_parameter_more_than_groups_have_is_a_unit_more() -> None:
    model = architecture(3)
    whole, gone = model.block_parameters(), 3 * 64 * group_sizes(model, 0)["ffn"]
    for more, kept in ((-0.5, (4, 192)), (0.5, (3, 192))):
        small = small_architecture(model, settings(ratio=round((gone + more) / whole, 12)))
        assert [(shape.kv_heads, shape.ffn) for shape in small.layers] == [kept] * 3
        assert whole - small.block_parameters() >= gone + more


def test_the_nearer_number_of_groups_wins() -> None:
    """Half of the parameters: two KV groups and half of the FFN channels, exactly."""
    sizes = group_sizes(architecture(), 0)
    assert counts_without(SHAPE, 2 * sizes["kv"] + 128 * sizes["ffn"], 64) == (2, 128)
    # A parameter more costs a unit of FFN channels, or a KV group, whichever is less.
    kv, ffn = counts_without(SHAPE, 2 * sizes["kv"] + 128 * sizes["ffn"] + 1, 64)
    assert (kv, ffn) == ((1, 128) if sizes["kv"] < 64 * sizes["ffn"] else (2, 64))

import re

import pytest

from prune.counting import kept_count, loram_kept, parameter_count
from prune.exceptions import PruneError, RatioError
from prune.groups import LayerShape

LLAMA2_13B = LayerShape(hidden=5120, heads=40, kv_heads=40, head_dim=128, ffn=13824)
LLAMA_70B = LayerShape(hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672)
MODELS = {
    "llama2-13b": (LLAMA2_13B, 40, 32000),
    "llama2-70b": (LLAMA_70B, 80, 32000),
    "llama3.1-70b": (LLAMA_70B, 80, 128256),
}


def loram_count(model: str, ratio: float) -> int:
    """Parameters after LoRAM's structured pruning: the first four and last two layers whole."""
    shape, layers, vocab = MODELS[model]
    small = loram_kept(shape, ratio)
    return parameter_count([shape] * 4 + [small] * (layers - 6) + [shape] * 2, vocab, tied=False)


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3.1-70b", 70_553_706_496),
    ],
)
def test_published_counts_of_whole_models(model: str, count: int) -> None:
    shape, layers, vocab = MODELS[model]
    assert parameter_count([shape] * layers, vocab, tied=False) == count


@pytest.mark.parametrize(
    ("model", "ratio", "count"),
    [
        ("llama2-13b", 0.65, 6_005_662_720),
        ("llama2-70b", 0.65, 28_099_436_544),
        ("llama2-70b", 0.75, 21_488_738_304),
        ("llama2-70b", 0.85, 16_272_924_672),
        ("llama2-70b", 0.95, 9_662_226_432),
        ("llama3.1-70b", 0.85, 17_849_982_976),
    ],
)
def test_published_counts_of_pruned_models(model: str, ratio: float, count: int) -> None:
    assert loram_count(model, ratio) == count


@pytest.mark.parametrize(
    ("model", "published", "with_constants", "with_embeddings"),
    [("llama2-70b", 16.95, 16.43, 15.04), ("llama3.1-70b", 15.81, 15.32, 11.45)],
)
def test_reduction_ratios(model: str, published: float, with_constants: float, with_embeddings: float) -> None:
    shape, layers, vocab = MODELS[model]
    whole = parameter_count([shape] * layers, vocab, tied=False)
    small = loram_count(model, 0.85)
    stored = 4 + 8 / 64 + 32 / (64 * 256)  # NF4, blocks of 64, 8-bit absmax in groups of 256
    ends = 2 * vocab * shape.hidden  # embedding and head stay in 16 bits
    assert round(whole * 16 / (small * 4), 2) == published
    assert round(whole * 16 / (small * stored), 2) == with_constants
    assert round(whole * 16 / ((small - ends) * stored + ends * 16), 2) == with_embeddings


def test_a_quarter_of_llama_7b() -> None:
    # 25 % of heads and channels in 26 of 32 layers, LLM-Pruner's setting.
    shape = LayerShape(hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008)
    small = LayerShape(hidden=4096, heads=24, kv_heads=24, head_dim=128, ffn=8256)
    assert parameter_count([shape] * 32, 32000, tied=False) == 6_738_415_616
    assert parameter_count([shape] * 6 + [small] * 26, 32000, tied=False) == 5_422_977_024


def test_tied_and_biased_count_is_that_of_qwen2() -> None:
    # Qwen2-0.5B: 494,032,768 parameters, biases on q, k and v.
    shape = LayerShape(hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864)
    assert parameter_count([shape] * 24, 151936, tied=True, biases=("q", "k", "v")) == 494_032_768
    biases = 896 + 128 + 128 + 896 + 4864 + 4864 + 896
    plain = parameter_count([shape], 10, tied=True)
    assert parameter_count([shape], 10, tied=True, biases=True) - plain == biases
    assert parameter_count([shape], 10, tied=False) - plain == 8960


@pytest.mark.parametrize(("ratio", "kv_heads"), [(0.65, 3), (0.75, 2), (0.85, 2), (0.95, 1)])
def test_grouped_query_widths(ratio: float, kv_heads: int) -> None:
    small = loram_kept(LLAMA_70B, ratio)
    assert (small.kv_heads, small.heads, small.hidden, small.head_dim) == (kv_heads, 8 * kv_heads, 8192, 128)
    assert small.ffn == {0.65: 10035, 0.75: 7168, 0.85: 4300, 0.95: 1433}[ratio]


def test_decimal_ratios_are_exact() -> None:
    # 100 * 0.55 is 55.00000000000001 in floats; its ceiling would drop one channel too many.
    shape = LayerShape(hidden=8, heads=100, kv_heads=100, head_dim=2, ffn=100)
    assert (loram_kept(shape, 0.55).ffn, loram_kept(shape, 0.55).kv_heads) == (45, 45)


def test_errors() -> None:
    with pytest.raises(RatioError, match=r"must be in \[0, 1\)"):
        loram_kept(LLAMA_70B, 1.0)
    with pytest.raises(RatioError, match="would keep 0 KV heads"):
        loram_kept(LayerShape(8, 4, 4, 2, 100), 0.9)
    with pytest.raises(PruneError, match="expected one hidden size"):
        parameter_count([], 10, tied=True)
    with pytest.raises(PruneError, match=r"\[5120, 8192\]"):
        parameter_count([LLAMA2_13B, LLAMA_70B], 10, tied=True)
    with pytest.raises(PruneError, match="unknown role 'query'"):
        parameter_count([LLAMA_70B], 10, tied=True, biases=["query"])


@pytest.mark.parametrize(
    ("total", "ratio", "align", "expected"),
    [
        (28672, 0.85, 128, 4352),  # 4300.8 is nearest to 34 * 128
        (28672, 0.85, 1, 4301),
        (8, 0.65, 1, 3),
        (8, 0.0625, 1, 8),  # 7.5 rounds up
        (90, 0.0, 64, 90),  # nothing asked, nothing aligned
        (100, 0.1, 64, 64),  # 90 is nearer to 64 than to 128
        (120, 0.1, 64, 120),  # 108 is nearer to 128, which does not exist
        (40, 0.5, 64, 40),  # less than one unit there is
        (1024, 0.99, 128, 128),  # at least one unit
        (200, 0.52, 64, 128),  # 96, half way, goes up
        (20, 0.45, 1, 11),  # exactly 11, although 20 * (1 - 0.45) in floats is above
        (10, 0.95, 1, 1),  # exactly one half: the last ratio that works
    ],
)
def test_kept_count(total: int, ratio: float, align: int, expected: int) -> None:
    assert kept_count(total, ratio, align) == expected


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_outside_the_unit_interval(ratio: float) -> None:
    with pytest.raises(RatioError, match=r"must be in \[0, 1\)"):
        kept_count(8, ratio, 1)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 28672])
def test_the_largest_ratio_named_works_and_is_sharp(total: int) -> None:
    with pytest.raises(RatioError, match=f"would remove all of {total}") as caught:
        kept_count(total, 0.999999, 1)
    largest = float(re.search(r"works is ([0-9.]+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert kept_count(total, largest, 1) == 1
    with pytest.raises(RatioError):
        kept_count(total, largest + 2e-6, 1)


def test_counts_must_be_positive() -> None:
    with pytest.raises(PruneError, match="must be positive, found 0 and 1"):
        kept_count(0, 0.5, 1)
    with pytest.raises(PruneError, match="must be positive, found 8 and 0"):
        kept_count(8, 0.5, 0)

import re

import pytest

from prune.counting import kept_count, loram_kept
from prune.exceptions import PruneError, RatioError
from prune.groups import LayerShape

LLAMA_70B = LayerShape(hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672)


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

"""How many groups stay of a layer that is pruned: our counts, aligned, and LoRAM's own.

Integer arithmetic without tensors, so a plan can be drawn up before any weight is touched.
"""

import math
from collections.abc import Collection
from fractions import Fraction

from prune.exceptions import PruneError, RatioError
from prune.groups import KIND, PRUNED_AXIS, ROLES, LayerShape, group_width


def loram_kept(shape: LayerShape, ratio: float) -> LayerShape:
    """Widths LoRAM keeps of one unprotected layer at ``ratio``: its own rounding, no alignment.

    From arXiv 2502.13533 and its released code. FFN: f - ceil(f * p). KV heads under GQA: n - floor(n * p),
    with their query heads; heads under MHA: floor(n * (1 - p)). LoRAM protects the first four and the last
    two layers. Raises RatioError when the ratio is outside [0, 1) or nothing would stay.
    """
    if not 0 <= ratio < 1:
        raise RatioError(f"a pruning ratio must be in [0, 1), found {ratio}")
    exact = exact_ratio(ratio)
    ffn = shape.ffn - math.ceil(shape.ffn * exact)
    if shape.queries_per_kv == 1:
        kv_heads = math.floor(shape.kv_heads * (1 - exact))
    else:
        kv_heads = shape.kv_heads - math.floor(shape.kv_heads * exact)
    if not ffn or not kv_heads:
        raise RatioError(f"ratio {ratio} would keep {kv_heads} KV heads and {ffn} FFN channels of {shape}")
    return LayerShape(shape.hidden, kv_heads * shape.queries_per_kv, kv_heads, shape.head_dim, ffn)


def kept_count(total: int, ratio: float, align: int) -> int:
    """Groups that stay of ``total`` when the share ``ratio`` is to go, as a multiple of ``align``.

    ``total * (1 - ratio)`` is rounded to an integer, then to the nearest multiple of ``align`` (halves up
    both times), then held between one ``align`` and ``total``; so the result is a multiple of ``align`` or
    ``total`` itself. Ratio 0 gives ``total``. The ratio is taken as the decimal it prints as: 0.1 means one
    tenth.

    Raises RatioError when the ratio is outside [0, 1) or rounds to keeping nothing (the message names the
    largest ratio that works), PruneError when ``total`` or ``align`` is not positive.
    """
    if total < 1 or align < 1:
        raise PruneError(f"total and align must be positive, found {total} and {align}")
    if not 0 <= ratio < 1:
        raise RatioError(f"a pruning ratio must be in [0, 1), found {ratio}")
    if ratio == 0:
        return total
    wanted = math.floor(total * (1 - exact_ratio(ratio)) + Fraction(1, 2))
    if wanted == 0:
        # Rounded down: a printed bound must be one that works.
        largest = math.floor((1 - Fraction(1, 2 * total)) * 10**6) / 10**6
        raise RatioError(f"ratio {ratio} would remove all of {total}; the largest that works is {largest}")
    nearest = (2 * wanted + align) // (2 * align) * align
    return min(total, max(align, nearest))


def offered_counts(total: int, align: int) -> tuple[int, ...]:
    """Counts that may stay of ``total`` groups, ascending: multiples of ``align`` below it, and all.

    Raises PruneError when ``total`` or ``align`` is not positive.
    """
    if total < 1 or align < 1:
        raise PruneError(f"total and align must be positive, found {total} and {align}")
    return (*range(align, total, align), total)


def group_parameters(kind: str, shape: LayerShape, biased: Collection[str] = ()) -> int:
    """Parameters that leave with one group of ``kind``: its rows and columns, and the biases of its rows.

    ``biased``: the roles that carry a bias; those of o and down stay, for their outputs do.
    """
    return sum(
        group_width(role, shape) * (shape.hidden + (role in biased and PRUNED_AXIS[role] == "rows"))
        for role in ROLES
        if KIND[role] == kind
    )


def counts_without(shape: LayerShape, parameters: int, align: int, biased: Collection[str] = ()) -> tuple[int, int]:
    """(KV groups, FFN channels) that stay of a layer when at least ``parameters`` are to go, as few more as can be.

    Both kinds lose about the same share, as in LoRAPrune and LoRAM: KV groups are one of the two whole numbers around
    that share's, FFN channels the most that ``offered_counts`` has room for. Of the two the one with less excess stays,
    or more KV groups. Where neither leaves an FFN channel count, other numbers of KV groups are tried. ``parameters`` 0
    gives all. Raises RatioError when the least that must stay, one KV group and one ``align``, is too much.
    """
    sizes = {kind: group_parameters(kind, shape, biased) for kind in ("kv", "ffn")}
    whole = sum(sizes[kind] * shape.group_count(kind) for kind in sizes)
    even = shape.kv_heads * (1 - Fraction(parameters, whole))
    found = []
    for kv_heads in range(1, shape.kv_heads + 1):
        left = whole - parameters - kv_heads * sizes["kv"]
        fitting = [ffn for ffn in offered_counts(shape.ffn, align) if ffn * sizes["ffn"] <= left]
        if fitting:
            excess = left - fitting[-1] * sizes["ffn"]
            found.append((abs(kv_heads - even) >= 1, excess, -kv_heads, fitting[-1]))
    if not found:
        raise RatioError(f"at least {parameters} parameters are to go, of {whole} in the groups of {shape}")
    _, _, kv_heads, ffn = min(found)
    return -kv_heads, ffn


def masked_count(rows: int, columns: int, ratio: float) -> int:
    """Entries of a [rows, columns] matrix that go at ``ratio``, never more than that share.

    Raises RatioError when the ratio is outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise RatioError(f"a pruning ratio must be in [0, 1), found {ratio}")
    return math.floor(exact_ratio(ratio) * rows * columns)


def exact_ratio(ratio: float) -> Fraction:
    """The decimal a float prints as; binary rounding of 0.55 must not move a floor or a ceiling."""
    return Fraction(str(float(ratio)))

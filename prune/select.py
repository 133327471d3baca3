"""Which groups stay: counts from ratios, then the best scores of every layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prune.counting import kept_count
from prune.exceptions import PruneError, RatioError
from prune.groups import LayerShape
from prune.indexmap import IndexMap, LayerKept

__all__ = ["kept_count", "select"]


def select(
    scores: Sequence[Mapping[str, Tensor]],
    shapes: Sequence[LayerShape],
    *,
    kv_ratio: float,
    ffn_ratio: float,
    align: int,
    protect_first: int = 0,
    protect_last: int = 0,
) -> IndexMap:
    """Keep the highest scores of every layer; of equal scores the lower index stays.

    ``scores[layer]`` holds "kv" [kv_heads] and "ffn" [ffn]. Ranking is local to a layer and a kind, as in
    LoRAPrune and LoRAM; ``align`` applies to FFN channels, KV heads are counted singly. The first
    ``protect_first`` and last ``protect_last`` layers stay whole and their scores are not read.

    Raises RatioError when a ratio is unusable (see ``kept_count``) or when every layer is protected while a
    ratio is above 0; PruneError when lengths disagree, a score is missing, misshapen or NaN (naming the
    layer), or a protected count is negative.
    """
    if len(scores) != len(shapes):
        raise PruneError(f"expected scores for {len(shapes)} layers, found {len(scores)}")
    if protect_first < 0 or protect_last < 0:
        raise PruneError(f"protected counts must not be negative, found {protect_first} and {protect_last}")
    ratios = {"kv": kv_ratio, "ffn": ffn_ratio}
    aligns = {"kv": 1, "ffn": align}
    end = len(shapes) - protect_last
    if protect_first >= end and any(ratio > 0 for ratio in ratios.values()):
        raise RatioError(
            f"{protect_first} first and {protect_last} last protected layers cover all {len(shapes)} layers; "
            "protect fewer, or set the ratios to 0"
        )
    layers = []
    for number, shape in enumerate(shapes):
        kept = {}
        for kind, ratio in ratios.items():
            total = shape.group_count(kind)
            if protect_first <= number < end:
                try:
                    count = kept_count(total, ratio, aligns[kind])
                except RatioError as error:
                    raise RatioError(f"layer {number}, {kind}: {error}") from None
                kept[kind] = _best(_checked(scores[number], number, kind, total), count)
            else:
                kept[kind] = tuple(range(total))
        layers.append(LayerKept(kept["kv"], kept["ffn"]))
    return IndexMap(tuple(layers), tuple(shapes))


def _checked(scores: Mapping[str, Tensor], layer: int, kind: str, total: int) -> Tensor:
    if kind not in scores:
        raise PruneError(f"layer {layer} has no {kind} scores")
    values = scores[kind]
    if tuple(values.shape) != (total,):
        raise PruneError(f"layer {layer}: {kind} scores must have shape ({total},), found {tuple(values.shape)}")
    if bool(values.isnan().any()):
        raise PruneError(f"layer {layer}: {kind} scores contain NaN; its weights are probably not finite")
    return values


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    # A stable sort leaves equal scores in index order, so the lower index wins.
    order = torch.sort(scores, descending=True, stable=True).indices
    return tuple(int(index) for index in order[:count].sort().values.tolist())

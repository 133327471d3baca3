"""Which groups stay: the best scores of every layer, so many of each kind, and what goes with the others."""

from collections.abc import Mapping, Sequence

from torch import Tensor, float64

from prune.exceptions import PruneError
from prune.groups import LayerShape
from prune.indexmap import IndexMap, LayerKept


def keep_best(
    scores: Sequence[Mapping[str, Tensor]], shapes: Sequence[LayerShape], counts: Sequence[tuple[int, int]]
) -> IndexMap:
    """Keep the highest scores of every layer; of equal scores the lower index stays.

    ``scores[layer]`` holds "kv" [kv_heads] and "ffn" [ffn], ``counts[layer]`` how many of each stay. Ranking is local
    to a layer and a kind, as in LoRAPrune and LoRAM. Scores of a layer that stays whole are not read.

    Raises PruneError when lengths disagree, a count is not between 1 and the number of groups, or a score is missing,
    misshapen or not finite (naming layer and kind).
    """
    if not len(scores) == len(shapes) == len(counts):
        raise PruneError(f"expected scores and counts for {len(shapes)} layers, found {len(scores)} and {len(counts)}")
    layers = []
    for number, (shape, (kv_heads, ffn)) in enumerate(zip(shapes, counts, strict=True)):
        for kind, count in (("kv", kv_heads), ("ffn", ffn)):
            if not 1 <= count <= shape.group_count(kind):
                raise PruneError(
                    f"layer {number}: expected 1 to {shape.group_count(kind)} {kind} groups to stay, found {count}"
                )
        if (kv_heads, ffn) == (shape.kv_heads, shape.ffn):
            layers.append(LayerKept(tuple(range(kv_heads)), tuple(range(ffn))))
            continue
        check_scores(scores[number], shape, number)
        layers.append(LayerKept(_best(scores[number]["kv"], kv_heads), _best(scores[number]["ffn"], ffn)))
    return IndexMap(tuple(layers), tuple(shapes))


def check_scores(scores: Mapping[str, Tensor], shape: LayerShape, layer: int) -> None:
    """Raise PruneError, naming layer and kind, unless there is one finite score for every group."""
    for kind in ("kv", "ffn"):
        total = shape.group_count(kind)
        if kind not in scores:
            raise PruneError(f"layer {layer} has no {kind} scores")
        values = scores[kind]
        if tuple(values.shape) != (total,):
            raise PruneError(f"layer {layer}: {kind} scores must have shape ({total},), found {tuple(values.shape)}")
        if not bool(values.isfinite().all()):
            raise PruneError(
                f"layer {layer}: {kind} scores contain NaN or infinity; its weights or moments are probably not finite"
            )


def removal_losses(scores: Tensor, counts: Sequence[int]) -> list[float]:
    """Sum of the scores of what goes when only so many of the best stay, for each of ``counts``.

    ``scores`` [groups]; sums are fp64, from the lowest score up. Raises PruneError for a count beyond the groups.
    """
    if any(not 0 <= count <= len(scores) for count in counts):
        raise PruneError(f"expected counts from 0 to {len(scores)}, found {list(counts)}")
    lowest = scores.to(float64).sort().values.cumsum(dim=0)
    return [float(lowest[len(scores) - count - 1]) if count < len(scores) else 0.0 for count in counts]


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    # A stable sort leaves equal scores in index order, so the lower index wins.
    order = scores.sort(descending=True, stable=True).indices
    return tuple(int(index) for index in order[:count].sort().values.tolist())

"""Scores smoothed over training steps."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import LayerShape

_KINDS = ("kv", "ffn")


class MovingAverage:
    """Exponential moving average of the group scores of several layers: bar <- decay * bar + (1 - decay) * scores.

    From zeros, as LoRAPrune's (arXiv 2305.18403, decay 0.9), which shrinks all scores of the first steps alike and so
    moves no ranking; or from ``start``, earlier ``scores()``, to go on exactly. Raises PruneError for a decay outside
    [0, 1), or a start that is misshapen or not finite.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], decay: float = 0.9, start: Sequence[Mapping[str, Tensor]] | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise PruneError(f"a decay must be in [0, 1), found {decay}")
        self._shapes, self._decay = tuple(shapes), decay
        zeros = [
            {kind: torch.zeros(shape.group_count(kind), dtype=torch.float64) for kind in _KINDS} for shape in shapes
        ]
        self._average = zeros if start is None else self._taken(start)
        if not _finite(self._average):
            raise PruneError("an average cannot start from scores that are not finite")

    def update(self, scores: Sequence[Mapping[str, Tensor]]) -> bool:
        """Take in one step's scores of every layer, {"kv": [kv_heads], "ffn": [ffn]} each, or all of them not at all.

        False, and nothing is changed, when any score of any layer is NaN or infinite: one overflow leaves marks
        everywhere. Raises PruneError when a layer or a kind is missing or misshapen.
        """
        found = self._taken(scores)
        if not _finite(found):
            return False
        for average, new in zip(self._average, found, strict=True):
            for kind in _KINDS:
                average[kind] = self._decay * average[kind] + (1 - self._decay) * new[kind]
        return True

    def scores(self) -> list[dict[str, Tensor]]:
        """The average by layer and kind: fp64, on the host, copies."""
        return [{kind: values.clone() for kind, values in layer.items()} for layer in self._average]

    def _taken(self, scores: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        if len(scores) != len(self._shapes):
            raise PruneError(f"expected scores for {len(self._shapes)} layers, found {len(scores)}")
        for number, (layer, shape) in enumerate(zip(scores, self._shapes, strict=True)):
            for kind in _KINDS:
                found = tuple(layer[kind].shape) if kind in layer else None
                if found != (shape.group_count(kind),):
                    expected = (shape.group_count(kind),)
                    raise PruneError(f"layer {number}: {kind} scores must have shape {expected}, found {found}")
        return [{kind: layer[kind].detach().to("cpu", torch.float64, copy=True) for kind in _KINDS} for layer in scores]


def _finite(scores: Sequence[Mapping[str, Tensor]]) -> bool:
    return all(bool(torch.isfinite(values).all()) for layer in scores for values in layer.values())

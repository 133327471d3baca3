"""Scores of coupled groups: how much each KV head and each FFN channel of a layer seems to matter.

Every score is a dict {"kv": fp64 [kv_heads], "ffn": fp64 [ffn]}; larger means more important.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import KIND, ROLES, LayerShape, pruned_dim, shape_of

_ROW_BLOCK: Final = 256


class GroupScores:
    """Magnitude scores of one layer, gathered one weight at a time so that only one dense weight is alive.

    Score of a group = sum over its member weights m of (squared entries of m inside the group) / (all
    squared entries of m). Dividing every weight by its own total makes members comparable whatever their
    size or scale: the kv scores of a layer add up to 4 (q, k, v, o) and the ffn scores to 3 (gate, up,
    down). A weight that is zero everywhere adds nothing. Groups and sums are those of LoRAPrune (arXiv
    2305.18403), magnitude variant; that method's released code divides by the L2 norm of the score vector
    instead.
    """

    def __init__(self, shape: LayerShape) -> None:
        self._shape = shape
        self._parts: dict[str, Tensor] = {}

    def add(self, role: str, weight: Tensor) -> None:
        """Account for ``weight`` [out, in], floating point of any width, sums in fp64.

        Raises PruneError for an unknown role, a role given twice, or a shape that is not the role's. Peak
        bytes: at most 16 * 256 * in on top of the weight.
        """
        expected = shape_of(role, self._shape)
        if role in self._parts:
            raise PruneError(f"the weight of {role} was added twice")
        if tuple(weight.shape) != expected:
            raise PruneError(f"{role} must have shape {expected}, found {tuple(weight.shape)}")
        sums = _squared_sums(weight, pruned_dim(role))
        per_group = sums.reshape(self._shape.group_count(KIND[role]), -1).sum(dim=1)
        total = per_group.sum()
        self._parts[role] = torch.where(total == 0, 0.0, per_group / total)

    def scores(self) -> dict[str, Tensor]:
        """The scores, on the device of the weights. Non-finite weights give NaN, which ``select`` refuses.

        Raises PruneError when a weight is missing: a group scored on some of its members is not comparable.
        """
        missing = [role for role in ROLES if role not in self._parts]
        if missing:
            raise PruneError(f"no weight was added for {', '.join(missing)}")
        return {
            kind: torch.stack([self._parts[role] for role in ROLES if KIND[role] == kind]).sum(dim=0)
            for kind in ("kv", "ffn")
        }


def magnitude(weights: Mapping[str, Tensor], shape: LayerShape) -> dict[str, Tensor]:
    """Magnitude scores of one layer from its seven dense weights [out, in] by role; see ``GroupScores``.

    Raises PruneError for an unknown or missing role or a wrong shape. Peak bytes: at most 16 * 256 * in.
    """
    gathered = GroupScores(shape)
    for role, weight in weights.items():
        gathered.add(role, weight)
    return gathered.scores()


def activation(role: str, weight: Tensor, input_squares: Tensor, shape: LayerShape) -> Tensor:
    """Scores of the groups that ``role`` ("o" for KV groups, "down" for FFN channels) reads, fp64 [groups].

    Score of a group = sum over its columns j of E[x_j^2] * ||W_:j||^2: the expected squared change of the layer's
    output when the group goes, if inputs are uncorrelated. It is Wanda's weight-times-activation score (arXiv
    2306.11695), squared and summed over what leaves together. ``weight`` [out, in]; ``input_squares`` [in], the mean
    square of each input. Raises PruneError for a role whose columns are not pruned or a shape that does not fit. Peak
    bytes: 16 * 256 * in.
    """
    expected = shape_of(role, shape)
    if pruned_dim(role) != 1 or tuple(weight.shape) != expected or tuple(input_squares.shape) != expected[1:]:
        raise PruneError(
            f"expected o or down with a weight {expected} and its {expected[1]} input moments, found {role} with "
            f"{tuple(weight.shape)} and {tuple(input_squares.shape)}"
        )
    per_column = _squared_sums(weight, 1) * input_squares.to(torch.float64)
    return per_column.reshape(shape.group_count(KIND[role]), -1).sum(dim=1)


def random(shape: LayerShape, generator: torch.Generator) -> dict[str, Tensor]:
    """Uniform scores in [0, 1) on the generator's device: the random pruner of LoRAM (arXiv 2502.13533)."""
    return {
        kind: torch.rand(shape.group_count(kind), generator=generator, dtype=torch.float64, device=generator.device)
        for kind in ("kv", "ffn")
    }


def _squared_sums(weight: Tensor, dim: int) -> Tensor:
    """Squared entries of ``weight`` summed onto its axis ``dim``, fp64, a block of rows at a time."""
    blocks = (block.to(torch.float64).square().sum(dim=1 - dim) for block in torch.split(weight, _ROW_BLOCK))
    if dim == 0:
        return torch.cat(list(blocks))
    return sum(blocks, torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device))

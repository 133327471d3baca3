"""From entries of a layer's weights to scores of its groups: sums over channels, over groups, over member weights.

A channel is a row of q, k, v, gate and up, or a column of o and down: what one pruned output or input is made of.
"""

from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import KIND, ROLES, LayerShape, check_role, pruned_dim, shape_of

Rows = Callable[[int, int], Tensor]
"""(start, stop) to those rows of a matrix [out, in], made when they are asked for: [stop - start, in]."""

ROW_BLOCK: Final = 256
"""Rows of a matrix that are worked on at once."""


def rows_of(weight: Tensor | Rows, shape: tuple[int, int]) -> Rows:
    """Rows of a matrix of this shape, itself or made on demand, checked to be the rows that were asked for.

    Raises PruneError when a matrix has another shape; the returned function raises it for rows of another shape.
    """
    if isinstance(weight, Tensor):
        if tuple(weight.shape) != shape:
            raise PruneError(f"expected a weight {shape}, found {tuple(weight.shape)}")
        matrix = weight
        return lambda start, stop: matrix[start:stop]
    make = weight

    def checked(start: int, stop: int) -> Tensor:
        rows, expected = make(start, stop), (stop - start, shape[1])
        if tuple(rows.shape) != expected:
            raise PruneError(f"rows {start} to {stop} must have shape {expected}, found {tuple(rows.shape)}")
        return rows

    return checked


def channel_sums(entries: Rows, out: int, dim: int) -> Tensor:
    """``entries`` of a matrix with ``out`` rows summed onto its axis ``dim``: fp64 [out] (0) or [in] (1).

    Sums are fp64 whatever the entries are. Raises PruneError for another ``dim``. Peak bytes: the entries of
    ROW_BLOCK rows, in fp64.
    """
    if dim not in (0, 1):
        raise PruneError(f"a weight [out, in] has the axes 0 and 1, found {dim}")
    starts = range(0, out, ROW_BLOCK)
    blocks = (entries(start, min(start + ROW_BLOCK, out)).to(torch.float64).sum(dim=1 - dim) for start in starts)
    if dim == 0:
        return torch.cat(list(blocks))
    first = next(blocks)
    return sum(blocks, first)


def at_least_fp32(values: Tensor) -> Tensor:
    """The values, widened if they are narrower than fp32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def magnitudes(entries: Tensor, power: Literal[1, 2]) -> Tensor:
    """|entries| (power 1) or their squares (2), fp64: squares of small gradients leave fp32. Raises PruneError."""
    if power not in (1, 2):
        raise PruneError(f"entries are summed as magnitudes (1) or squares (2), found the power {power}")
    wide = entries.to(torch.float64)
    return wide.abs() if power == 1 else wide.square()


def fold(role: str, channels: Tensor, shape: LayerShape) -> Tensor:
    """Sums over the channels of each group of ``role``: [groups, ...] from [channels, ...], in its dtype.

    Query heads are consecutive within their KV head, so query head j adds to the KV head j // queries_per_kv. Raises
    PruneError for an unknown role or another number of channels.
    """
    check_role(role)
    expected = shape_of(role, shape)[pruned_dim(role)]
    if channels.ndim < 1 or channels.shape[0] != expected:
        raise PruneError(f"{role} has {expected} channels that can go, found values {tuple(channels.shape)}")
    groups = shape.group_count(KIND[role])
    return channels.reshape(groups, expected // groups, *channels.shape[1:]).sum(dim=1)


class MemberScores:
    """Scores of one layer's groups, added up over the weights that lose something with each group.

    ``norm`` makes weights of different size and scale comparable before they are added: 2 divides each weight's
    scores by their Euclidean norm, as LoRAPrune's released code does (arXiv 2305.18403; it adds 1e-8 to the norm, which
    ties scores to the scale of the loss and is left out here); 1 divides them by their sum; None adds them as they are,
    which is what the paper writes. A weight whose scores are all zero adds nothing.
    """

    def __init__(self, shape: LayerShape, norm: Literal[1, 2] | None = 2) -> None:
        if norm not in (1, 2, None):
            raise PruneError(f"member scores are divided by their norm of order 1 or 2 or by none, found {norm}")
        self._shape, self._norm = shape, norm
        self._parts: dict[str, Tensor] = {}

    def add(self, role: str, scores: Tensor) -> None:
        """Account for the non-negative scores [groups] that one weight gives to its groups.

        Raises PruneError for an unknown role, a role given twice, or another number of groups.
        """
        check_role(role)
        if role in self._parts:
            raise PruneError(f"the weight of {role} was added twice")
        groups = self._shape.group_count(KIND[role])
        if tuple(scores.shape) != (groups,):
            raise PruneError(f"{role} must have scores ({groups},), found {tuple(scores.shape)}")
        wide = scores.to(torch.float64)
        if self._norm is not None:
            size = wide.sum() if self._norm == 1 else torch.linalg.vector_norm(wide)
            wide = torch.where(size == 0, 0.0, wide / size)
        self._parts[role] = wide

    def scores(self) -> dict[str, Tensor]:
        """{"kv": fp64 [kv_heads], "ffn": fp64 [ffn]}. Scores that are not finite give NaN or infinity.

        Raises PruneError when a weight is missing: a group scored on some of its members is not comparable.
        """
        missing = [role for role in ROLES if role not in self._parts]
        if missing:
            raise PruneError(f"no weight was added for {', '.join(missing)}")
        return {
            kind: torch.stack([self._parts[role] for role in ROLES if KIND[role] == kind]).sum(dim=0)
            for kind in ("kv", "ffn")
        }

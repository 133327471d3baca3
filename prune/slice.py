"""Cut the kept rows or columns out of a weight, and the kept entries out of a bias."""

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import PRUNED_AXIS, pruned_dim


def slice_rows_or_columns(weight: Tensor, role: str, kept: Tensor) -> Tensor:
    """The kept part of ``weight`` [out, in]: rows (q, k, v, gate, up) or columns (o, down). A copy.

    ``kept`` is int64 [n], strictly ascending original indices, on any device. Any dtype, codes included.
    Raises PruneError for an unknown role, a weight that is not a matrix, or indices out of order or out of
    bounds. Peak bytes: the result.
    """
    dim = pruned_dim(role)
    if weight.ndim != 2:
        raise PruneError(f"expected a weight [out, in], found shape {tuple(weight.shape)}")
    check_kept(kept, weight.shape[dim])
    return weight.index_select(dim, kept.to(weight.device))


def slice_bias(bias: Tensor, role: str, kept: Tensor) -> Tensor:
    """The kept entries of ``bias`` [out] of a row-pruned role (q, k, v, gate, up). A copy.

    Raises PruneError for o and down, whose outputs are the residual stream and whose biases stay whole, and
    otherwise as ``slice_rows_or_columns``.
    """
    if pruned_dim(role) != 0:
        raise PruneError(f"{role} is pruned by {PRUNED_AXIS[role]}, so its bias stays whole")
    if bias.ndim != 1:
        raise PruneError(f"expected a bias [out], found shape {tuple(bias.shape)}")
    check_kept(kept, bias.shape[0])
    return bias.index_select(0, kept.to(bias.device))


def check_kept(kept: Tensor, total: int) -> None:
    """Raise PruneError unless ``kept`` is int64 [n >= 1], strictly ascending, within [0, total)."""
    if kept.dtype != torch.int64 or kept.ndim != 1 or kept.numel() == 0:
        raise PruneError(f"kept indices must be a non-empty int64 vector, found {kept.dtype} {tuple(kept.shape)}")
    if bool((kept[1:] <= kept[:-1]).any()):
        raise PruneError("kept indices must be strictly ascending: their order is that of the sliced model")
    first, last = int(kept[0]), int(kept[-1])
    if first < 0 or last >= total:
        raise PruneError(f"kept indices must be within [0, {total}), found {first} to {last}")

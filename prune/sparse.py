"""Which single entries of a matrix go: any of them, or N of every M along the inputs. No shape changes.

A mask is bool [out, in], True where an entry goes. It is what LoRAM-Unst and LoRAM-Semi (arXiv 2502.13533) prune by;
entries are ranked as in Wanda (2306.11695) or SparseGPT (2301.00774). ``ratio`` is the share that goes, exactly
``masked_count`` entries of a matrix; with ``group`` it goes from each ``group`` consecutive inputs of a row, so that
N:M is the ratio N / M and the group M. Where scores are equal the earlier entry goes.
"""

from typing import Final

import torch
from torch import Tensor

from prune.counting import exact_ratio, masked_count
from prune.exceptions import PruneError
from prune.members import ROW_BLOCK

# Columns whose entries compete with each other, and whose corrections are applied one by one.
_SPAN: Final = 128


@torch.no_grad()
def wanda_mask(weight: Tensor, inputs: Tensor, ratio: float, group: int | None = None) -> Tensor:
    """The lowest |W_ij| * inputs_j of every row, or group: bool [out, in].

    ``weight`` [out, in] of any float dtype; ``inputs`` [in], their root mean squares. Without ``group`` rows lose the
    same number, or one more where that is needed for the total. Raises PruneError for shapes, a ratio or a group that
    do not fit, or scores that are not finite. Peak bytes: the mask, and 20 * 256 * in.
    """
    rows, columns = _check(weight, ratio, group)
    if tuple(inputs.shape) != (columns,):
        raise PruneError(f"expected a root mean square for each of {columns} inputs, found {tuple(inputs.shape)}")
    mask = torch.empty(rows, columns, dtype=torch.bool, device=weight.device)
    for start in range(0, rows, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, rows)
        scores = weight[start:stop].float().abs() * inputs.float()
        if group is None:
            ends = [masked_count(row, columns, ratio) for row in range(start, stop + 1)]
            mask[start:stop] = _lowest(scores, torch.tensor(ends).diff())
        else:
            mask[start:stop] = _lowest_of_groups(scores, ratio, group)
    return mask


@torch.no_grad()
def inverse_root(covariance: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor, fp32 [n, n], of the inverse of ``covariance`` [n, n] (symmetric; its diagonal is raised by
    ``damping`` times its mean): what ``sparsegpt_mask`` needs to know of the inputs.

    Row j squared at its diagonal is the j-th diagonal entry of the inverse over the columns from j on. Factorised in
    fp64. Inputs that are always zero are no exception. Raises PruneError for a matrix that is not square or not finite,
    and where calibration saw too few tokens for every direction and the damping does not make up for it. Peak bytes: 24
    an entry.
    """
    n = len(covariance)
    if tuple(covariance.shape) != (n, n):
        raise PruneError(f"expected a covariance [n, n], found {tuple(covariance.shape)}")
    if not bool(torch.isfinite(covariance).all()):
        raise PruneError("the covariance of the inputs contains NaN or infinity")
    # For H = U U^T with U upper triangular it is U^-1, and U is the lower factor of H reversed, itself reversed.
    damped = covariance.flip(0, 1).double()
    mean = float(damped.diagonal().mean())
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise PruneError(
            f"the covariance of {n} inputs is singular, also damped by {damping}: calibrate on more tokens, or raise "
            "the damping"
        )
    del damped
    inverse = torch.eye(n, dtype=torch.float64, device=factor.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    return inverse.float().flip(0, 1)


@torch.no_grad()
def sparsegpt_mask(weight: Tensor, root: Tensor, ratio: float, group: int | None = None) -> Tensor:
    """The entries that SparseGPT removes from ``weight`` [out, in]: bool [out, in].

    Columns are gone through from the first to the last. The score of an entry is what its loss costs under the
    covariance behind ``root`` (of ``inverse_root``) if later columns make up for it, w^2 over the diagonal of the
    inverse; w is what it has become by making up for earlier ones. Without ``group`` the entries of 128 columns at a
    time compete, over all rows, with it those of a row's group when its turn comes. Raises PruneError as
    ``wanda_mask``. Peak bytes: four an entry for the corrected weight, two for masks, and 28 * 128 * out.
    """
    rows, columns = _check(weight, ratio, group)
    if tuple(root.shape) != (columns, columns):
        raise PruneError(f"expected a factor for {columns} inputs, found {tuple(root.shape)}")
    span = _SPAN if group is None else max(1, _SPAN // group) * group
    # [in, out]: a column is a contiguous row.
    left = weight.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    gone = torch.empty(columns, rows, dtype=torch.bool, device=weight.device)
    for start in range(0, columns, span):
        stop = min(start + span, columns)
        values, removed, inner = left[start:stop], gone[start:stop], root[start:stop, start:stop]
        cost, errors = inner.diagonal().square()[:, None], torch.empty_like(values)
        if group is None:
            count = masked_count(rows, stop, ratio) - masked_count(rows, start, ratio)
            removed[:] = _lowest((values.square() / cost).view(1, -1), torch.tensor([count])).view_as(removed)
        for index in range(stop - start):
            if group is not None and index % group == 0:
                near = slice(index, index + group)
                removed[near] = _lowest_of_groups((values[near].square() / cost[near]).T, ratio, group).T
            errors[index] = values[index] * removed[index] / inner[index, index]
            values[index + 1 :].addr_(inner[index, index + 1 :], errors[index], alpha=-1)
        left[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1)
    return gone.T.contiguous()


def check_mask(mask: Tensor, ratio: float, group: int | None = None) -> None:
    """Raise PruneError unless ``mask`` [out, in] takes what ``ratio`` says, and with ``group`` from every group."""
    rows, columns = _check(mask, ratio, group)
    expected, found = masked_count(rows, columns, ratio), int(mask.sum())
    if found != expected:
        raise PruneError(f"expected {expected} of {rows * columns} entries to go, found {found}")
    if group is not None:
        wanted = _whole(ratio, group)
        by_group = mask.view(rows, -1, group).sum(dim=2)
        if bool((by_group != wanted).any()):
            row, place = (by_group != wanted).nonzero()[0].tolist()
            raise PruneError(
                f"expected {wanted} of every {group} inputs to go, found {int(by_group[row, place])} in row {row} from "
                f"input {group * place} on"
            )


def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries of a row [out, in] to a byte, the first in its lowest bit: uint8 [out, ceil(in / 8)]."""
    rows, columns = mask.shape
    padded = torch.zeros(rows, -(-columns // 8), 8, dtype=torch.uint8, device=mask.device)
    padded.view(rows, -1)[:, :columns] = mask
    return (padded << _bits(mask.device)).sum(dim=2, dtype=torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """The inverse of ``pack_mask``: bool [out, columns]. Raises PruneError for another width, or bits behind a row."""
    rows = len(packed)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (rows, -(-columns // 8)):
        raise PruneError(f"expected a packed mask of {columns} inputs, found {packed.dtype} {tuple(packed.shape)}")
    bits = (packed.unsqueeze(2) >> _bits(packed.device) & 1).bool().view(rows, -1)
    if bool(bits[:, columns:].any()):
        raise PruneError(f"a packed mask of {columns} inputs has bits behind them")
    return bits[:, :columns].contiguous()


def _check(matrix: Tensor, ratio: float, group: int | None) -> tuple[int, int]:
    if matrix.ndim != 2:
        raise PruneError(f"expected a matrix [out, in], found {tuple(matrix.shape)}")
    rows, columns = matrix.shape
    if group is not None:
        _whole(ratio, group)
        if columns % group:
            raise PruneError(f"{columns} inputs do not split into groups of {group}")
    return rows, columns


def _whole(ratio: float, group: int) -> int:
    """Entries of a group that go."""
    wanted = exact_ratio(ratio) * group
    if group < 1 or wanted.denominator != 1:
        raise PruneError(f"a share of {ratio} is no whole number of every {group} inputs")
    return int(wanted)


def _lowest_of_groups(scores: Tensor, ratio: float, group: int) -> Tensor:
    """The mask [rows, columns] of the lowest ``scores`` in every group of a row."""
    sets = scores.reshape(-1, group)
    return _lowest(sets, torch.tensor([_whole(ratio, group)])).view(scores.shape)


def _lowest(scores: Tensor, counts: Tensor) -> Tensor:
    """True at the ``counts`` [sets] (or [1]) lowest scores of every set: bool [sets, size]."""
    if not bool(torch.isfinite(scores).all()):
        raise PruneError("scores of entries contain NaN or infinity; the weights or moments are probably not finite")
    order = scores.argsort(dim=1, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place) < counts.to(scores.device)[:, None]


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)

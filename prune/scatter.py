"""Put an adapter trained on the pruned model back at the original shapes, and the inverse.

Recovery of LoRAM (arXiv 2502.13533): with I kept rows and J kept columns, R(B A) = S_I^T (B A) S_J. The
update equals the trained one on kept entries and is exactly zero elsewhere; rank, alpha and scaling do not
change. Only one of the two factors has a pruned axis, and only that one changes. Adapters with extra
parameters that depend on whole weights (magnitude vectors, for one) cannot be recovered by zero filling.
"""

from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import pruned_dim
from prune.slice import check_kept


def scatter_adapter(
    a: Tensor, b: Tensor, role: str, kept: Tensor, shape_full: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(A [r, in], B [out, r]) at ``shape_full`` = (out, in) from a [r, in'] and b [out', r], zero filled.

    Row-pruned roles (q, k, v, gate, up) scatter the rows of b and return a itself; o and down scatter the
    columns of a and return b itself. dtype and device are those of the factors. Raises PruneError when
    shapes, rank and ``kept`` (int64, strictly ascending, within the full axis) disagree. Peak bytes: the
    scattered factor; the product [out, in] is never formed.
    """
    dim = pruned_dim(role)
    _check_factors(a, b, role)
    check_kept(kept, shape_full[dim])
    expected = [*shape_full]
    expected[dim] = kept.numel()
    if [b.shape[0], a.shape[1]] != expected:
        raise PruneError(
            f"{role}: {kept.numel()} kept of {shape_full} need an adapter for {tuple(expected)}, "
            f"found one for {(b.shape[0], a.shape[1])}"
        )
    if dim == 0:
        return a, b.new_zeros(shape_full[0], b.shape[1]).index_copy_(0, kept.to(b.device), b)
    return a.new_zeros(a.shape[0], shape_full[1]).index_copy_(1, kept.to(a.device), a), b


def restrict_adapter(a: Tensor, b: Tensor, role: str, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``scatter_adapter``: (a [r, in'], b [out', r]) from A [r, in] and B [out, r].

    Also slices any low-rank pair B A along with its weight: (W + B A)[I, J] = W[I, J] + B[I] A[:, J]. The
    factor without a pruned axis is returned itself. Raises PruneError as ``scatter_adapter`` does. Peak
    bytes: the sliced factor.
    """
    dim = pruned_dim(role)
    _check_factors(a, b, role)
    check_kept(kept, b.shape[0] if dim == 0 else a.shape[1])
    if dim == 0:
        return a, b.index_select(0, kept.to(b.device))
    return a.index_select(1, kept.to(a.device)), b


def _check_factors(a: Tensor, b: Tensor, role: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise PruneError(
            f"{role}: expected factors a [r, in] and b [out, r] of one rank, "
            f"found {tuple(a.shape)} and {tuple(b.shape)}"
        )

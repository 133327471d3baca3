"""LoRAPrune's score: importance of frozen weights from the gradients of a low-rank adapter (arXiv 2305.18403).

With W + s B A in place of W, dloss/dA = s B^T G and dloss/dB = s G A^T for the gradient G of the whole weight, which is
never formed. What stands in for it,

    Ghat = dB A + B dA - eta dB dA = s (G A^T A + B B^T G) - eta s^2 G A^T B^T G,

sees G through the row space of A and the column space of B: where B is zero, as at the start, columns are mixed and
only sums over rows mean much; where A is zero, only sums over columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import LayerShape, check_role, pruned_dim, shape_of
from prune.members import Rows, at_least_fp32, channel_sums, fold, magnitudes, rows_of


@dataclass(frozen=True, eq=False)
class Adapter:
    """Factors A [r, in] and B [out, r] of an adapter, the loss gradients of both, and its scaling s = alpha / r.

    Gradients are those of the loss itself: of a scaled loss they scale the scores, and change the ranking if eta is not
    0. Raises PruneError for shapes that do not fit or a scaling that is not finite.
    """

    a: Tensor
    b: Tensor
    grad_a: Tensor
    grad_b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in (self.a, self.b, self.grad_a, self.grad_b)]
        matrices = self.a.ndim == self.b.ndim == 2
        if not matrices or self.a.shape[0] != self.b.shape[1] or shapes[:2] != shapes[2:]:
            found = ", ".join(map(str, shapes))
            raise PruneError(f"expected A [r, in], B [out, r] and gradients of the same shapes, found {found}")
        if not math.isfinite(self.scaling):
            raise PruneError(f"expected a finite scaling, found {self.scaling}")


@torch.no_grad()
def guided_sums(
    adapter: Adapter, weight: Tensor | Rows, dim: int, *, eta: float = 0.0, power: Literal[1, 2] = 1
) -> Tensor:
    """|Ghat o (W + s B A)|^power summed onto one axis: fp64 [out] for ``dim`` 0, [in] for ``dim`` 1.

    ``weight`` is what the adapter is added to, with every other additive part: [out, in], or made by rows, so that a
    quantised one is never dense. s scales the adapter in the weight; Ghat has it only through the gradients. The paper
    squares, the released code takes absolute values, both with eta = 1. The eta term is quadratic in the gradient: with
    it, a loss and a multiple of that loss may rank groups differently. Products are at least fp32, sums fp64.

    Raises PruneError for shapes that do not fit, another axis or power, or an eta that is not finite. Peak bytes:
    20 * 256 * in and twice the factors and their gradients; nothing of the size of the weight.
    """
    if not math.isfinite(eta):
        raise PruneError(f"expected a finite eta, found {eta}")
    out, fan_in = adapter.b.shape[0], adapter.a.shape[1]
    rows = rows_of(weight, (out, fan_in))
    parts = (adapter.a, adapter.b, adapter.grad_a, adapter.grad_b)
    dtype = reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
    a, b, grad_a, grad_b = (part.to(dtype) for part in parts)
    # Both terms in one product: [dB, B] on the left, [A - eta dA; dA] on the right.
    left, right = torch.cat([grad_b, b], dim=1), torch.cat([a - eta * grad_a, grad_a])

    def entries(start: int, stop: int) -> Tensor:
        effective = at_least_fp32(rows(start, stop)) + adapter.scaling * (b[start:stop] @ a)
        return magnitudes(effective.mul_(left[start:stop] @ right), power)

    return channel_sums(entries, out, dim)


def guided(
    role: str,
    adapter: Adapter,
    weight: Tensor | Rows,
    shape: LayerShape,
    *,
    eta: float = 0.0,
    power: Literal[1, 2] = 1,
) -> Tensor:
    """``guided_sums`` over the groups of ``role``: fp64 [groups], ready for ``MemberScores``.

    Raises PruneError as it does, and for an unknown role or an adapter of another weight.
    """
    expected, found = shape_of(role, shape), (adapter.b.shape[0], adapter.a.shape[1])
    if found != expected:
        raise PruneError(f"{role} needs an adapter of a weight {expected}, found one of {found}")
    return fold(role, guided_sums(adapter, weight, pruned_dim(role), eta=eta, power=power), shape)


def side_matched(role: str, shape: LayerShape, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors (A [rank, in], B [out, rank]) that leave the model as it is and see ``role`` from the side of its groups.

    A random and B zero for q, k, v, gate and up, as LoRA starts; A zero and B random for o and down, whose groups are
    columns. Random entries are normal with variance 1 / rank: then Ghat / s has G as its mean over draws. fp32 on the
    generator's device. Raises PruneError for an unknown role or a rank below 1.
    """
    check_role(role)
    if rank < 1:
        raise PruneError(f"a rank must be positive, found {rank}")
    out, fan_in = shape_of(role, shape)
    a, b = torch.zeros(rank, fan_in, device=generator.device), torch.zeros(out, rank, device=generator.device)
    (a if pruned_dim(role) == 0 else b).normal_(std=rank**-0.5, generator=generator)
    return a, b


def averaged(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter whose Ghat, and whose B A, is the mean of those of several, signs kept.

    Redrawn factors see other parts of the same gradient, and their errors cancel only before the absolute value. The
    ranks add up: factors and gradients of n adapters, each divided by sqrt(n), are stacked, so no [out, in] is summed.
    All gradients must be those of one weight, each with its own adapter alone. Raises PruneError when there is none, or
    when widths or scalings differ.
    """
    widths = {(adapter.b.shape[0], adapter.a.shape[1], adapter.scaling) for adapter in adapters}
    if len(widths) != 1:
        raise PruneError(f"expected adapters of one weight (out, in) and scaling, found {sorted(widths)}")
    share = len(adapters) ** -0.5
    return Adapter(
        torch.cat([adapter.a for adapter in adapters]) * share,
        torch.cat([adapter.b for adapter in adapters], dim=1) * share,
        torch.cat([adapter.grad_a for adapter in adapters]) * share,
        torch.cat([adapter.grad_b for adapter in adapters], dim=1) * share,
        adapters[0].scaling,
    )

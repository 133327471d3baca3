"""Algebra of LoRA updates D = left @ right on their factors, left [out, rank] and right [rank, in]: D [out, in] is
never formed. And what an update does to the singular vectors of the weight it is added to.

Factors of any floating dtype in, float64 inside and out. Every function of factors raises ShapeError for factors that
do not belong together and NonFiniteError for NaN or infinity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError

# Singular values below this share of the largest are rounding of float64.
_ROUNDING = 1e-14

# Directions below this share of the largest are what is left of zero in float32 factors.
_RESOLVED = 1e-6


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of the product: U [out, p], values [p] in descending order, V^H [p, in], with p = min(rank, out, in).

    QR of both sides, then the SVD of the product of both triangles. Peak: the factors about three times, in float64.
    """
    left, right = _checked(left, right)
    one, two = torch.linalg.qr(left), torch.linalg.qr(right.mT)
    u, values, vh = torch.linalg.svd(one.R @ two.R.mT, full_matrices=False)
    return one.Q @ u, values, vh @ two.Q.mT


def product_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of the product; relative to the factors' size it is exact to rounding, also for a difference of
    two products that nearly cancel."""
    left, right = _checked(left, right)
    one, two = (torch.linalg.qr(side, mode="r").R for side in (left, right.mT))
    return float((one @ two.mT).norm())


def inner_product(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Sum of the entries of D1 o D2 for two products of the same sides, from [rank1, rank2] matrices."""
    (left, right), (other_left, other_right) = _checked(*first), _checked(*second)
    if (left.shape[0], right.shape[1]) != (other_left.shape[0], other_right.shape[1]):
        raise ShapeError(
            f"expected products of the same sides, found {left.shape[0]} x {right.shape[1]} and "
            f"{other_left.shape[0]} x {other_right.shape[1]}"
        )
    return float(((left.mT @ other_left) * (right @ other_right.mT)).sum())


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [out, p] and [p, in] of the product's best approximation of rank `rank` in the Frobenius norm (Eckart and
    Young 1936), p = min(rank, number of singular values); each side carries the square root of the singular values.

    Raises ShapeError for a rank below 1.
    """
    if rank < 1:
        raise ShapeError(f"expected a rank of at least 1, found {rank}")
    u, values, vh = product_svd(left, right)
    root = values[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def rank_of_energy(values: Tensor, energy: float) -> int:
    """The smallest rank, 1 at least, whose singular values keep the share `energy` of the sum of all squares: the
    relative error of such a truncation is at most sqrt(1 - energy). What is rounding counts as zero.

    values [p] in descending order. Raises QuantError for a share that is not in (0, 1].
    """
    if not 0 < energy <= 1:
        raise QuantError(f"energy must be above 0 and at most 1, got {energy}")
    squares = values.double().square()
    lost = squares.flip(0).cumsum(0).flip(0)
    allowed = float(lost[0]) * max(1 - energy, _ROUNDING**2 * len(squares))
    return max(1, int((lost > allowed).sum()))


def subspaces(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of what the product writes [out, r] and of what it reads [in, r], the directions whose singular
    value is above 1e-6 of the largest; r = 0 for a product of zero."""
    u, values, vh = product_svd(left, right)
    kept = int((values > _RESOLVED * values[0]).sum())
    return u[:, :kept], vh[:kept].mT


def subspace_overlap(first: Tensor, second: Tensor) -> float | None:
    """``||U1^T U2||_F^2 / min(r1, r2)`` of orthonormal bases U1 [n, r1] and U2 [n, r2], between 0 (orthogonal) and 1
    (one contains the other); None where one is empty. Random ones have max(r1, r2) / n on average.

    LoRA, arXiv 2106.09685, section 7.2, equation 4, with the whole of both bases.
    """
    smaller = min(first.shape[1], second.shape[1])
    return float((first.mT @ second).square().sum()) / smaller if smaller else None


@dataclass(frozen=True)
class Intruders:
    """What `find_intruders` found among the leading left singular vectors of a changed weight.

    cosines: of each, the largest absolute cosine with any left singular vector of the weight before. count: how many
    are below the threshold. energy: their share of the squared singular values of those looked at. largest: the
    largest singular value.
    """

    cosines: tuple[float, ...]
    count: int
    energy: float
    largest: float


def left_vectors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors [m, min(m, n)] and values of a weight [m, n], in its dtype, float32 or float64. Peak:
    the weight about five times. Raises ShapeError, QuantError and NonFiniteError for what is no such weight."""
    if weight.dim() != 2 or not weight.numel():
        raise ShapeError(f"expected a non-empty matrix, got {list(weight.shape)}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise QuantError(f"weight must be float32 or float64, got {weight.dtype}")
    # The extremes carry any NaN or infinity and, unlike a mask, take no memory.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise NonFiniteError("weight holds NaN or infinity")
    u, values, _ = torch.linalg.svd(weight, full_matrices=False)
    return u, values


def find_intruders(before: Tensor, changed: Tensor, *, top: int = 10, threshold: float = 0.5) -> Intruders:
    """Which of the `top` leading left singular vectors of a changed weight [m, n] are intruders: those whose absolute
    cosine with every column of `before` [m, p], the left singular vectors of the weight before, is below `threshold`.

    An intruder is spread over many of the old directions, not outside their span. Where m is below about 64 a random
    direction is often above 0.5 by chance, so that a count says little there. Peak: as `left_vectors`. Intruder
    dimensions, arXiv 2410.21228, with its k = 10 and epsilon = 0.5. Raises as `left_vectors`, and ShapeError for
    another number of rows or a `top` below 1.
    """
    if top < 1 or before.dim() != 2 or before.shape[0] != changed.shape[0]:
        raise ShapeError(
            f"expected vectors of {len(changed)} entries and a top of 1 at least, found {list(before.shape)} and {top}"
        )
    u, values = left_vectors(changed)
    cosines = (before.mT @ u[:, :top]).abs().amax(dim=0)
    squares, new = values[:top].double().square(), cosines < threshold
    total = float(squares.sum())
    return Intruders(
        cosines=tuple(cosines.tolist()),
        count=int(new.sum()),
        energy=float(squares[new].sum()) / total if total else 0.0,
        largest=float(values[0]),
    )


def _checked(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of one product in float64."""
    if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0] or not (left.numel() and right.numel()):
        raise ShapeError(
            f"expected factors [out, rank] and [rank, in], found {list(left.shape)} and {list(right.shape)}"
        )
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NonFiniteError("factors hold NaN or infinity")
    return left.double(), right.double()

"""Truncated SVD, exact or randomised, optionally with diagonal row and column weights; factors as they are stored."""

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.scales import torch_dtype

# Weights below this fraction of the largest are raised to it, so a dead row or column yields finite factors.
_WEIGHT_FLOOR = 1e-6


@torch.no_grad()
def svd_lowrank(
    matrix: Tensor,
    rank: int,
    *,
    generator: torch.Generator,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    oversampling: int = 10,
    iterations: int = 2,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Factors left [m, rank] and right [rank, n] whose product is near the best such fit of `matrix` [m, n].

    Minimises ``|| diag(row_weight) (matrix - left @ right) diag(column_weight) ||_F``; weights are
    non-negative [m] and [n], floored at 1e-6 of their largest (an all-zero weight counts as no weight).
    Singular directions come sorted, so a smaller rank is a slice, and each side carries the square root of
    the singular values: LQ-LoRA (arXiv 2311.12023). fp32 or fp64 in, the same out.

    Randomised range finder with `iterations` power iterations, re-orthogonalised by QR (Halko, Martinsson,
    Tropp 2011, algorithm 4.4); a full SVD when `exact` or when rank >= min(m, n) // 2. `generator` may live
    on another device: the probe is drawn there and moved. Peak: one copy of `matrix` if weighted, plus (m +
    n) (rank + oversampling) elements a few times; the full SVD takes about three copies more.

    Raises ShapeError for a rank outside 0..min(m, n) or weights of another length, QuantError for another
    dtype or negative weights, NonFiniteError for NaN or infinity.
    """
    _check_matrix(matrix, rank)
    rows = floored(row_weight, matrix, 0)
    columns = floored(column_weight, matrix, 1)
    if rank == 0:
        return matrix.new_empty(matrix.shape[0], 0), matrix.new_empty(0, matrix.shape[1])
    weighted = matrix
    if rows is not None:
        weighted = weighted * rows[:, None]
    if columns is not None:
        weighted = weighted * columns
    if exact or rank >= min(matrix.shape) // 2:
        u, s, vh = torch.linalg.svd(weighted, full_matrices=False)
    else:
        u, s, vh = _randomised_svd(weighted, rank + oversampling, iterations, generator)
    root = s[:rank].sqrt()
    left = u[:, :rank] * root
    right = root[:, None] * vh[:rank]
    if rows is not None:
        left = left / rows[:, None]
    if columns is not None:
        right = right / columns
    return left, right


def store_factors(left: Tensor, right: Tensor, dtype: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors left [m, rank] and right [rank, n] in the dtype a Choice names, and their scale: fp32 [rank] for "int8"
    (see `quantize_factors`), else None."""
    if dtype == "int8":
        return quantize_factors(left, right)
    return left.to(torch_dtype(dtype)), right.to(torch_dtype(dtype)), None


def quantize_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest int8 factors left [m, rank] and right [rank, n] in -127..127, and one scale fp32 [rank] per component.

    Component k of the product is ``scale[k] * left[:, k] right[k, :]``. Each side is divided by its largest magnitude
    over 127, and the scale is the product of both divisors; a component without a scale fp32 can hold is zero. Raises
    NonFiniteError for NaN or infinity, or a scale beyond fp32.
    """
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise NonFiniteError("low-rank factors hold NaN or infinity")
    if not left.shape[1]:
        return left.to(torch.int8), right.to(torch.int8), left.new_empty(0, dtype=torch.float32)
    left_step = left.double().abs().amax(dim=0) / 127
    right_step = right.double().abs().amax(dim=1) / 127
    scale = (left_step * right_step).float()
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError("low-rank factors are too large for int8 with a float32 scale")
    left_step, right_step = (torch.where(scale > 0, step, float("inf")) for step in (left_step, right_step))
    return (left / left_step).round().to(torch.int8), (right / right_step[:, None]).round().to(torch.int8), scale


def dequantize_factors(left: Tensor, right: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 factors left [m, rank] and right [rank, n] of what `store_factors` returned; a scale goes to the left."""
    return left.float() if scale is None else left.float() * scale, right.float()


def _randomised_svd(
    matrix: Tensor, size: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    size = min(size, *matrix.shape)
    probe = torch.randn(matrix.shape[1], size, generator=generator, device=generator.device, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ probe.to(matrix.device)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _check_matrix(matrix: Tensor, rank: int) -> None:
    if matrix.dim() != 2 or not matrix.numel():
        raise ShapeError(f"expected a non-empty matrix, got {list(matrix.shape)}")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise QuantError(f"matrix must be float32 or float64, got {matrix.dtype}")
    if not 0 <= rank <= min(matrix.shape):
        raise ShapeError(f"rank {rank} is outside 0..{min(matrix.shape)} for a {list(matrix.shape)} matrix")
    # The extremes carry any NaN or infinity and, unlike a mask, take no memory.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all()):
        raise NonFiniteError("matrix holds NaN or infinity")


def floored(weight: Tensor | None, matrix: Tensor, dim: int) -> Tensor | None:
    """A weight of the rows (`dim` 0) or columns (1) of `matrix`, as `svd_lowrank` takes it; raises as that does."""
    if weight is None:
        return None
    side = ("row", "column")[dim]
    if weight.shape != (matrix.shape[dim],):
        raise ShapeError(f"{side} weight must be [{matrix.shape[dim]}], got {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{side} weight holds NaN or infinity")
    if bool((weight < 0).any()):
        raise QuantError(f"{side} weight must not be negative")
    weight = weight.to(matrix)
    largest = weight.amax()
    return torch.where(largest > 0, weight.clamp(min=_WEIGHT_FLOOR * largest), 1.0)

"""Alternating decomposition of a weight into a quantised part and a low-rank part: W = Q + L1 L2."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.blockwise import BlockQuantized, quantize, rebuild
from quant.exceptions import QuantError, ShapeError
from quant.lowrank import dequantize_factors, store_factors, svd_lowrank
from quant.storage import Choice

# Elements scored at once: bounds the float64 temporary to a few MB.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Decomposition:
    """The best iterate of `decompose`.

    quantized: codes and scales of Q. left [rows, rank], right [rank, columns]: the factors in the dtype they
    are stored in, factor_scale: fp32 [rank] if that is int8, else None; so Q + left @ diag(factor_scale) @ right
    approximates the weight. losses: weighted squared error of every iteration in order. loss: the smallest of
    them; best: its index.
    """

    quantized: BlockQuantized
    left: Tensor
    right: Tensor
    factor_scale: Tensor | None
    losses: tuple[float, ...]
    loss: float
    best: int


@torch.no_grad()
def decompose(
    weight: Tensor,
    choice: Choice,
    *,
    generator: torch.Generator,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    max_iterations: int = 20,
    patience: int = 2,
    first: tuple[Tensor, Tensor] | None = None,
    levels: Tensor | None = None,
) -> Decomposition:
    """Decompose fp32 `weight` [rows, columns] as LQ-LoRA (arXiv 2311.12023), but keep the best iterate.

    From Q = 0, repeat: fit the low-rank part to W - Q (weighted if `row_weight` [rows] or `column_weight`
    [columns] are given), round it to the choice's factor_dtype, quantise what it leaves. Rounding comes before
    quantising, so the loss is that of the stored numbers. Stops after `patience` iterations in a row without
    improvement, or at `max_iterations`. The loss is ``sum((row_weight[:, None] * column_weight * (W - Q - L1
    L2))**2)``, summed in float64. `first` replaces the first fit: (left [rows, rank], right [rank, columns]),
    for instance shared between choices. `levels` [2**bits] replace the grid's own, see `quantize`.

    Same input and generator state, same result on one device. Peak: three fp32 copies of `weight` beside it
    plus two sets of codes. Raises ShapeError, QuantError or NonFiniteError as `quantize` and
    `svd_lowrank` do.
    """
    if max_iterations < 1 or patience < 1:
        raise QuantError(f"max_iterations and patience must be positive, got {max_iterations} and {patience}")
    rank = choice.rank
    if first is not None:
        _check_first(first, weight, rank)
    target = weight
    losses: list[float] = []
    best: tuple[BlockQuantized, Tensor, Tensor, Tensor | None] | None = None
    best_at = 0
    # Without a low-rank part every iteration is the first one again.
    for iteration in range(max_iterations if rank else 1):
        if iteration == 0 and first is not None:
            left, right = first
        else:
            left, right = svd_lowrank(
                target, rank, generator=generator, row_weight=row_weight, column_weight=column_weight
            )
        stored = store_factors(left, right, choice.factor_dtype)
        residual = torch.matmul(*dequantize_factors(*stored))
        torch.sub(weight, residual, out=residual)
        quantized = quantize(residual, choice, levels)
        target = rebuild(quantized, choice)
        losses.append(weighted_loss(residual.sub_(target), row_weight, column_weight))
        if best is None or losses[-1] < losses[best_at]:
            best, best_at = (quantized, *stored), iteration
        elif iteration - best_at >= patience:
            break
        torch.sub(weight, target, out=target)
    assert best is not None  # the loop ran at least once
    return Decomposition(*best, losses=tuple(losses), loss=losses[best_at], best=best_at)


@torch.no_grad()
def weighted_loss(error: Tensor, row_weight: Tensor | None = None, column_weight: Tensor | None = None) -> float:
    """``sum((row_weight[:, None] * column_weight * error)**2)`` in float64; `error` [m, n], weights [m] and
    [n] or None for ones.

    Peak: a few MB. Raises ShapeError when a weight has another length.
    """
    m, n = error.shape
    rows = (error.new_ones(m) if row_weight is None else row_weight).to(error.device, torch.float64)
    columns = (error.new_ones(n) if column_weight is None else column_weight).to(rows)
    if rows.shape != (m,) or columns.shape != (n,):
        raise ShapeError(f"weights {list(rows.shape)} and {list(columns.shape)} do not fit {[m, n]}")
    step = max(1, _CHUNK // n)
    by_row = [error[i : i + step].double().square() @ columns.square() for i in range(0, m, step)]
    return float(torch.cat(by_row) @ rows.square())


def _check_first(first: tuple[Tensor, Tensor], weight: Tensor, rank: int) -> None:
    left, right = first
    if left.shape != (weight.shape[0], rank) or right.shape != (rank, weight.shape[1]):
        found = f"{list(left.shape)} and {list(right.shape)}"
        raise ShapeError(f"first factors {found} do not fit {list(weight.shape)} at rank {rank}")

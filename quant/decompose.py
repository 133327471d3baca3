"""Alternating decomposition of a weight into a quantised part and a low-rank part: W = Q + L1 L2."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.blockwise import BlockQuantized, quantize, rebuild
from quant.exceptions import QuantError, ShapeError
from quant.lowrank import dequantize_factors, store_factors
from quant.metric import Metric
from quant.rounding import Feedback, quantize_compensated
from quant.storage import UNSEARCHED, Choice

PLAIN = Metric()


@dataclass(frozen=True)
class Decomposition:
    """An iterate of `decompose`.

    quantized: codes and scales of Q, in the stored orientation. left [out, rank], right [rank, in]: the factors in the
    dtype they are stored in, factor_scale: fp32 [rank] if that is int8, else None; so Q + left @ diag(factor_scale)
    @ right approximates the weight. losses: the metric's loss of every iteration in order. loss: that of the iterate
    returned; at: its index.
    """

    quantized: BlockQuantized
    left: Tensor
    right: Tensor
    factor_scale: Tensor | None
    losses: tuple[float, ...]
    loss: float
    at: int


@torch.no_grad()
def decompose(
    weight: Tensor,
    choice: Choice,
    *,
    generator: torch.Generator,
    metric: Metric = PLAIN,
    passing: Feedback | None = None,
    transposed: bool = False,
    max_iterations: int = 20,
    patience: int | None = 2,
    quantize_first: bool = False,
    first: tuple[Tensor, Tensor] | None = None,
    levels: Tensor | None = None,
    multiples: Sequence[float] = UNSEARCHED,
) -> Decomposition:
    """Decompose fp32 `weight` [out, in] in the loop of LQ-LoRA (arXiv 2311.12023), section 3.1.

    From Q = 0, repeat: fit the low-rank part to W - Q under `metric`, round it to the choice's factor_dtype, quantise
    what it leaves: to the nearest codes, or with `passing` error-compensated (which `metric` should share the
    covariance of). Factors are rounded before the quantisation, so the loss is that of the stored numbers. `transposed`
    stores Q as [in, out]. Stops after `patience` iterations in a row without improvement, or at `max_iterations`, and
    returns the best; with patience None as published: stops at the first increase and returns the last, which is the
    worse of the two. `quantize_first` is LoftQ (arXiv 2310.08659, algorithm 1) instead: the low-rank part starts at
    zero and is fitted once more at the end, for which `losses` has an entry of its own; all `max_iterations` are made
    and the last is returned. `first` replaces the first fit: (left [out, rank], right [rank, in]), for instance shared
    between choices. `levels` [2**bits] replace the grid's own, `multiples` are tried for every scale, see `quantize`.

    Same input and generator state, same result on one device. Peak: four fp32 copies of `weight` beside it plus two
    sets of codes. Raises ShapeError, QuantError or NonFiniteError as `quantize` and `Metric.fit` do.
    """
    if max_iterations < 1 or (patience is not None and patience < 1):
        raise QuantError(f"max_iterations and patience must be positive, got {max_iterations} and {patience}")
    if quantize_first and first is None:
        first = weight.new_zeros(weight.shape[0], choice.rank), weight.new_zeros(choice.rank, weight.shape[1])
    if first is not None:
        _check_first(first, weight, choice.rank)
    losses: list[float] = []
    kept: tuple[BlockQuantized, Tensor, Tensor, Tensor | None] | None = None
    at = 0
    target = weight
    # Without a low-rank part every iteration is the first one again.
    for iteration in range(max_iterations if choice.rank else 1):
        fitted = first if iteration == 0 else None
        left, right = fitted or metric.fit(target, choice.rank, generator)
        stored = store_factors(left, right, choice.factor_dtype)
        residual = torch.matmul(*dequantize_factors(*stored))
        torch.sub(weight, residual, out=residual)
        quantized = _quantized(residual, choice, passing, transposed, levels, multiples)
        target = rebuild(quantized, choice)
        if transposed:
            target = target.T
        losses.append(metric.loss(residual.sub_(target)))
        if kept is None or patience is None or quantize_first or losses[-1] < losses[at]:
            kept, at = (quantized, *stored), iteration
        if patience is None and not quantize_first and iteration and losses[-1] > losses[-2]:
            break
        if patience is not None and iteration - at >= patience:
            break
        target = weight - target
    if quantize_first and choice.rank:
        stored = store_factors(*metric.fit(target, choice.rank, generator), choice.factor_dtype)
        losses.append(metric.loss(target - torch.matmul(*dequantize_factors(*stored))))
        kept, at = (quantized, *stored), len(losses) - 1
    assert kept is not None  # the loop ran at least once
    return Decomposition(*kept, losses=tuple(losses), loss=losses[at], at=at)


def _quantized(
    residual: Tensor,
    choice: Choice,
    passing: Feedback | None,
    transposed: bool,
    levels: Tensor | None,
    multiples: Sequence[float],
) -> BlockQuantized:
    if passing is not None:
        return quantize_compensated(
            residual, choice, passing, transposed=transposed, levels=levels, multiples=multiples
        )
    return quantize(residual.T.contiguous() if transposed else residual, choice, levels, multiples)


def _check_first(first: tuple[Tensor, Tensor], weight: Tensor, rank: int) -> None:
    left, right = first
    if left.shape != (weight.shape[0], rank) or right.shape != (rank, weight.shape[1]):
        found = f"{list(left.shape)} and {list(right.shape)}"
        raise ShapeError(f"first factors {found} do not fit {list(weight.shape)} at rank {rank}")

"""Error tables: what each choice would cost in quality, for the allocator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.blockwise import quantize, rebuild
from quant.decompose import PLAIN, decompose
from quant.exceptions import QuantError, ShapeError
from quant.lowrank import dequantize_factors, store_factors
from quant.metric import Metric
from quant.rounding import Feedback
from quant.storage import UNSEARCHED, Choice


@dataclass(frozen=True)
class Sample:
    """Which outputs of a matrix stand for all of it.

    rows: int64, the outputs, in whole strips of block sizes; weight: fp32 [rows], how many outputs each stands for.
    """

    rows: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Estimate:
    """An estimated loss, and its standard error from having seen a sample of the outputs only: 0 if it was all."""

    loss: float
    error: float


@torch.no_grad()
def sample_outputs(weight: Tensor, metric: Metric, strip: int, count: int, generator: torch.Generator) -> Sample:
    """About `count` outputs of `weight` [m, n], in strips of `strip` neighbours, which every block of the choices must
    divide. Half of them are the strips with the heaviest outputs (one output with a huge weight can be most of a
    matrix's error), the others are drawn from the rest and stand for it. All outputs if m <= count.
    """
    m = weight.shape[0]
    if strip < 1 or m % strip:
        raise QuantError(f"{m} outputs do not split into strips of {strip}")
    strips, wanted = m // strip, -(-count // strip)
    if wanted >= strips:
        return Sample(torch.arange(m, device=weight.device), weight.new_ones(m))
    energy = weight.square().sum(dim=1)
    if metric.outputs is not None:
        energy = energy * metric.outputs.square()
    heavy = energy.view(strips, strip).amax(dim=1).argsort(descending=True, stable=True)
    certain = heavy[: wanted // 2]
    rest = heavy[wanted // 2 :]
    drawn = torch.randperm(len(rest), generator=generator, device=generator.device)[: wanted - len(certain)]
    chosen = torch.cat([certain, rest[drawn.to(rest.device)]])
    stands_for = torch.cat([weight.new_ones(len(certain)), weight.new_full((len(drawn),), len(rest) / len(drawn))])
    rows = (chosen[:, None] * strip + torch.arange(strip, device=weight.device)).flatten()
    return Sample(rows, stands_for.repeat_interleave(strip))


@torch.no_grad()
def error_table(
    weight: Tensor,
    choices: Sequence[Choice],
    *,
    generator: torch.Generator,
    metric: Metric = PLAIN,
    passing: dict[int | None, Feedback] | None = None,
    transposed: bool = False,
    outputs: int | None = None,
    multiples: Sequence[float] = UNSEARCHED,
) -> list[Estimate]:
    """Estimated loss of every one of `choices` on fp32 `weight` [out, in], in order.

    One factorisation serves all: it is made at the largest rank and cut for the others, since its directions are
    sorted, and its remainder is rounded to the nearest codes once for each choice, on a sample of about `outputs`
    outputs (None: all). With `passing` (by the columns that stay together, as `feedback` takes them) the squared errors
    of a column are counted as `Feedback.column_cost` says: that is the loss of compensated rounding, but for the
    correction of later columns, which does not change the size of their errors much. `full_table` is what it
    estimates. What alternation gains is not seen, so ranks look dearer than they are: on the first layer of SmolLM2,
    at 3 bits, full over estimated is 0.39 at rank 16 and 0.52 at rank 0 for keys, 0.87 and 0.92 for the
    gate. Peak: four fp32 copies of `weight`. Raises as `decompose`.
    """
    largest = max((choice.rank for choice in choices), default=0)
    left, right = metric.fit(weight, largest, generator)
    strip = math.lcm(*(choice.block_size for choice in choices)) if transposed and choices else 1
    sample = sample_outputs(weight, metric, strip, outputs or weight.shape[0], generator)
    rows = sample.weight if metric.outputs is None else sample.weight * metric.outputs[sample.rows].square()
    remainders: dict[tuple[int, str], Tensor] = {}
    found = []
    for choice in choices:
        key = choice.rank, choice.factor_dtype
        if key not in remainders:
            stored = store_factors(left[:, : choice.rank], right[: choice.rank], choice.factor_dtype)
            first, second = dequantize_factors(*stored)
            remainders[key] = weight[sample.rows] - first[sample.rows] @ second
        remainder = remainders[key]
        error = remainder - _nearest(remainder, choice, transposed, multiples)
        if passing is None:
            by_output = Metric(rows.sqrt(), metric.inputs, metric.covariance).by_output(error)
        else:
            cost = passing[None if transposed else choice.block_size].column_cost
            by_output = rows.double() * (error.double().square() @ cost.double())
        found.append(_estimate(by_output.view(-1, strip).sum(dim=1), sample.weight.view(-1, strip)[:, 0]))
    return found


def _estimate(losses: Tensor, stands_for: Tensor) -> Estimate:
    """From what each strip adds to the loss, counted as often as it stands for; those that stand for themselves alone
    are certain. One drawn strip tells nothing of its error, which is then taken to be the loss."""
    loss = float(losses.sum().clamp(min=0))
    drawn = losses[stands_for > 1]
    if not len(drawn):
        return Estimate(loss, 0.0)
    if len(drawn) == 1:
        return Estimate(loss, loss)
    left_out = 1 - 1 / float(stands_for.amax())
    return Estimate(loss, (len(drawn) * float(drawn.var()) * left_out) ** 0.5)


def full_table(
    weight: Tensor,
    choices: Sequence[Choice],
    *,
    generator_seed: int,
    metric: Metric = PLAIN,
    passing: dict[int | None, Feedback] | None = None,
    transposed: bool = False,
    max_iterations: int = 20,
    patience: int | None = 2,
    quantize_first: bool = False,
    multiples: Sequence[float] = UNSEARCHED,
) -> list[float]:
    """Loss of every one of `choices` after the whole decomposition, in order: LQ-LoRA's table (arXiv 2311.12023,
    section 3.2) with patience None. Each starts from a generator seeded alike. Peak, errors: those of `decompose`."""
    return [
        decompose(
            weight,
            choice,
            generator=torch.Generator().manual_seed(generator_seed),
            metric=metric,
            passing=None if passing is None else passing[None if transposed else choice.block_size],
            transposed=transposed,
            max_iterations=max_iterations,
            patience=patience,
            quantize_first=quantize_first,
            multiples=multiples,
        ).loss
        for choice in choices
    ]


def _nearest(matrix: Tensor, choice: Choice, transposed: bool, multiples: Sequence[float]) -> Tensor:
    stored = matrix.T.contiguous() if transposed else matrix
    try:
        choice.superblocks(*stored.shape)
    except ShapeError:  # of a sample; in the estimate every row has its own
        choice = replace(choice, superblock=None)
    rounded = rebuild(quantize(stored, choice, multiples=multiples), choice)
    return rounded.T if transposed else rounded

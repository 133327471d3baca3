"""Error tables: what each choice would cost in quality, for the allocator."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.blockwise import quantize, rebuild
from quant.decompose import PLAIN, decompose
from quant.exceptions import QuantError, ShapeError
from quant.lowrank import dequantize_factors, store_factors
from quant.metric import Metric
from quant.rounding import Chain, Feedback, passing_for
from quant.storage import UNSEARCHED, Choice

# Log-gain of an iteration over that of the one before: the median over 756 decompositions of SmolLM2's matrices (2 to
# 4 bits, ranks 16 to 64) is 0.58, and 0.38 from one to the second next.
_SHRINKS = 0.58


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

    def times(self, factor: float) -> "Estimate":
        return Estimate(self.loss * factor, self.error * factor)


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
    max_iterations: int = 1,
    patience: int | None = 2,
    quantize_first: bool = False,
    multiples: Sequence[float] = UNSEARCHED,
) -> list[Estimate]:
    """Estimated loss of every one of `choices` on fp32 `weight` [out, in], in order; `full_table` is what it estimates.

    One factorisation serves all: it is made at the largest rank and cut for the others, since its directions are
    sorted, and its remainder is rounded to the nearest codes once for each choice, on a sample of about `outputs`
    outputs (None: all). With `passing` (by the columns that stay together, as `feedback` takes them) the squared errors
    of a column grow as `Chain.growth` says and cost what `Feedback.column_cost` says.

    What that does not see, what alternation gains above all, is close to a factor of the rank alone (SmolLM2: 0.6 to 1,
    by rank and matrix). So entries are scaled to a whole decomposition each of rank 0, the smallest and the largest
    rank, with the fewest bits and a middle block size; other ranks get the geometric interpolation of their factors.
    Two iterations are made of `max_iterations`: their gain tells that of the rest, see `_gained`. `patience` and
    `quantize_first` are those of the loop.

    Peak: that of `decompose` beside one set of factors; before that, with `passing`, 12 bytes an entry of a root.
    Raises as `decompose`.
    """
    largest = max((choice.rank for choice in choices), default=0)
    factors = metric.fit(weight, largest, generator)
    strip = math.lcm(*(choice.block_size for choice in choices)) if transposed and choices else 1
    sample = sample_outputs(weight, metric, strip, outputs or weight.shape[0], generator)
    by_block = sorted(set(choices), key=lambda choice: (choice.block_size, choice.name))
    found = _FirstLook(weight, factors, sample, strip, metric, passing, transposed, multiples).estimates(by_block)
    scaled: dict[int, float] = {}
    for rank in _anchored({choice.rank for choice in choices}, passing, max_iterations, quantize_first):
        anchor = _anchor([choice for choice in by_block if choice.rank == rank])
        made = decompose(
            weight,
            anchor,
            generator=generator,
            metric=metric,
            passing=passing_for(anchor, passing, transposed),
            transposed=transposed,
            max_iterations=max_iterations if quantize_first else min(2, max_iterations),
            patience=patience,
            quantize_first=quantize_first,
            first=None if quantize_first else (factors[0][:, :rank], factors[1][:rank]),
            multiples=multiples,
        )
        expected = made.loss if quantize_first else _gained(made.losses, made.loss, max_iterations)
        scaled[rank] = expected / found[anchor].loss if found[anchor].loss > 0 else 1.0
    return [found[choice].times(_between(scaled, choice.rank)) for choice in choices]


def _anchored(ranks: set[int], passing: object, max_iterations: int, quantize_first: bool) -> list[int]:
    """Ranks whose first look is not the whole truth, two of the positive ones standing for all."""
    positive = sorted(ranks - {0})
    if passing is None:
        alternates = quantize_first or max_iterations > 1
        return sorted({positive[0], positive[-1]}) if positive and alternates else []
    return sorted({*ranks & {0}, *positive[:1], *positive[-1:]})


def _anchor(choices: Sequence[Choice]) -> Choice:
    fewest = min(choice.bits for choice in choices)
    alike = [choice for choice in choices if choice.bits == fewest]
    return alike[len(alike) // 2]


def _gained(losses: Sequence[float], returned: float, max_iterations: int) -> float:
    """Loss after `max_iterations` from that of the first one or two, of which `returned` was taken: the logarithm of
    what an iteration gains shrinks geometrically."""
    if len(losses) < 2 or losses[1] >= losses[0]:
        return returned
    iterations = (1 - _SHRINKS ** (max_iterations - 1)) / (1 - _SHRINKS)
    return losses[0] * math.pow(losses[1] / losses[0], iterations)


def _between(scaled: Mapping[int, float], rank: int) -> float:
    """The factor of a rank: its own, else interpolated on logarithmic scales between the nearest two positive ones."""
    if rank in scaled or not rank or not scaled:
        return scaled.get(rank, 1.0)
    low, high = min(r for r in scaled if r), max(scaled)
    share = math.log(rank / low) / math.log(high / low)
    return math.pow(scaled[low], 1 - share) * math.pow(scaled[high], share)


class _FirstLook:
    """Estimates from one factorisation and one rounding of sampled outputs; choices of one block size in a row share
    what depends on it."""

    def __init__(
        self,
        weight: Tensor,
        factors: tuple[Tensor, Tensor],
        sample: Sample,
        strip: int,
        metric: Metric,
        passing: dict[int | None, Feedback] | None,
        transposed: bool,
        multiples: Sequence[float],
    ) -> None:
        self.weight, self.factors, self.sample, self.strip = weight[sample.rows], factors, sample, strip
        counted = sample.weight
        self.rows = counted if metric.outputs is None else counted * metric.outputs[sample.rows].square()
        self.metric = Metric(self.rows.sqrt(), metric.inputs, metric.covariance)
        self.passing, self.transposed, self.multiples = passing, transposed, multiples
        self._remainders: dict[tuple[int, str], Tensor] = {}
        self._passing_on: tuple[Feedback, Chain, Tensor] | None = None

    def estimates(self, choices: Sequence[Choice]) -> dict[Choice, Estimate]:
        return {choice: self._estimate(choice) for choice in choices}

    def _estimate(self, choice: Choice) -> Estimate:
        remainder = self._remainder(choice)
        error = remainder - _nearest(remainder, choice, self.transposed, self.multiples)
        passing = passing_for(choice, self.passing, self.transposed)
        if passing is None:
            by_output = self.metric.by_output(error)
        else:
            if self._passing_on is None or self._passing_on[0] is not passing:
                self._passing_on = passing, passing.chain(), passing.column_cost()
            _, chain, cost = self._passing_on
            squares = error.square()
            growth = chain.growth(self.rows @ remainder.square(), self.rows @ squares)
            by_output = self.rows.double() * (squares.double() @ (growth * cost).double())
        return _estimate(by_output.view(-1, self.strip).sum(dim=1), self.sample.weight.view(-1, self.strip)[:, 0])

    def _remainder(self, choice: Choice) -> Tensor:
        key = choice.rank, choice.factor_dtype
        if key not in self._remainders:
            left, right = (self.factors[0][:, : choice.rank], self.factors[1][: choice.rank])
            left, right = dequantize_factors(*store_factors(left, right, choice.factor_dtype))
            self._remainders[key] = self.weight - left[self.sample.rows] @ right
        return self._remainders[key]


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
            passing=passing_for(choice, passing, transposed),
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

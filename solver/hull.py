"""Dominance, lower convex hulls, the Lagrangian bound, and the frontier for every budget from one sort.

The continuous relaxation of the multiple-choice knapsack is solved by walking the hull segments of all groups
in order of loss saved per cost unit (Sinha and Zoltners 1979); every prefix of that walk is the optimal
selection at its own cost.
"""

import math
from dataclasses import dataclass

import numpy as np

from solver.errors import Infeasible
from solver.problem import Problem
from solver.table import Bools, Floats, Ints, Table, tabulate

__all__ = [
    "Frontier",
    "Ladder",
    "Reduced",
    "frontier",
    "ladder",
    "lagrangian",
    "nondominated",
    "require_feasible",
]


@dataclass(frozen=True)
class Reduced:
    """Non-dominated choices of each group, cost rising and loss falling strictly along a row.

    Attributes:
        index: int64 [N, K], choice index in the problem.
        cost: int64 [N, K]; loss: float64 [N, K] in the table's scale.
        count: int64 [N], valid entries of each row. Padding has cost 0 and loss infinity.
    """

    index: Ints
    cost: Ints
    loss: Floats
    count: Ints

    def at(self, position: Ints) -> tuple[Ints, Floats]:
        """Cost and loss [N] of one position per row."""
        rows = np.arange(len(position))
        return self.cost[rows, position], self.loss[rows, position]


def nondominated(table: Table) -> Reduced:
    """Drop every choice for which another costs no more and loses no more (equals: the first stays)."""
    cost = np.where(table.allowed, table.cost, np.iinfo(np.int64).max)
    loss = np.where(table.allowed, table.loss, np.inf)
    order = np.argsort(cost, axis=1, kind="stable")
    loss = np.take_along_axis(loss, order, axis=1)
    falls = np.ones(loss.shape, dtype=np.bool_)
    falls[:, 1:] = loss[:, 1:] < np.minimum.accumulate(loss, axis=1)[:, :-1]
    falling = _keep(Reduced(order, np.take_along_axis(cost, order, axis=1), loss, order[:, 0]), falls)
    # Losses fall now, so where costs are equal only the last is left; a row's own last always is.
    last = np.arange(falling.cost.shape[1]) < falling.count[:, None]
    last[:, :-1] &= (falling.cost[:, :-1] != falling.cost[:, 1:]) | ~last[:, 1:]
    return _keep(falling, last)


def _keep(rows: Reduced, keep: Bools) -> Reduced:
    """Move the kept entries of each row to its left, in order, and trim the width."""
    count = np.count_nonzero(keep, axis=1)
    left = np.argsort(~keep, axis=1, kind="stable")[:, : count.max()]
    valid = np.arange(left.shape[1]) < count[:, None]
    cost = np.where(valid, np.take_along_axis(rows.cost, left, axis=1), 0)
    loss = np.where(valid, np.take_along_axis(rows.loss, left, axis=1), np.inf)
    return Reduced(np.take_along_axis(rows.index, left, axis=1), cost, loss, count)


def require_feasible(problem: Problem, table: Table, reduced: Reduced) -> None:
    """Raise Infeasible when even the cheapest choice of everything is over the budget."""
    minimum = int(reduced.cost[:, 0].sum())
    if minimum <= problem.budget:
        return
    parts: list[tuple[str, int]] = []
    for group, choice in zip(table.groups, reduced.index[:, 0].tolist(), strict=True):
        parts += [(problem.items[i].name, problem.items[i].choices[choice].cost) for i in group]
    largest = sorted(parts, key=lambda part: -part[1])[:5]
    raise Infeasible(problem.budget, minimum, tuple(largest))


@dataclass(frozen=True)
class Ladder:
    """Hull segments of all groups in greedy order: each next step saves most loss per cost unit.

    Attributes:
        hull: int64 [N, H], positions in the reduced rows of each group's lower hull, last one repeated.
        group: int64 [S], the group each step moves one hull vertex on.
        slope: float64 [S], loss saved per cost unit, non-increasing.
        cost: int64 [S + 1], total cost after each number of steps, strictly rising.
        saved: float64 [S], loss each step saves.
    """

    hull: Ints
    group: Ints
    slope: Floats
    cost: Ints
    saved: Floats

    def positions(self, steps: int) -> Ints:
        """Reduced-row position [N] of each group after that many steps."""
        taken = np.bincount(self.group[:steps], minlength=len(self.hull))
        return self.hull[np.arange(len(self.hull)), taken]


def ladder(reduced: Reduced) -> Ladder:
    """Sort all hull segments. Peak memory about 40 bytes per padded entry."""
    hull, slopes = _lower_hull(reduced)
    group, step = np.nonzero(hull[:, 1:] > hull[:, :-1])
    slope = slopes[group, step]
    order = np.argsort(-slope, kind="stable")
    group, step, slope = group[order], step[order], slope[order]
    here, there = hull[group, step], hull[group, step + 1]
    rise = reduced.cost[group, there] - reduced.cost[group, here]
    cost = np.concatenate([[0], np.cumsum(rise)]) + reduced.cost[:, 0].sum()
    return Ladder(hull, group, slope, cost, reduced.loss[group, here] - reduced.loss[group, there])


def _lower_hull(reduced: Reduced) -> tuple[Ints, Floats]:
    """Hull positions [N, H] and the slopes [N, H - 1] between them, negative past a row's last vertex.

    All rows walk at once, each to the point of steepest descent from where it stands; of collinear points the
    nearest comes first, which gives the greedy walk its smallest steps.
    """
    rows = np.arange(len(reduced.count))
    column = np.arange(reduced.cost.shape[1])
    here = np.zeros(len(rows), dtype=np.int64)
    hull, slopes = [here], []
    while (here + 1 < reduced.count).any():
        cost, loss = reduced.at(here)
        ahead = (column > here[:, None]) & (column < reduced.count[:, None])
        steep = np.full(reduced.loss.shape, -1.0)  # below any slope, even one that underflows to 0
        np.divide(loss[:, None] - reduced.loss, reduced.cost - cost[:, None], out=steep, where=ahead)
        there = np.where(ahead.any(axis=1), np.argmax(steep, axis=1), here)
        slopes.append(steep[rows, there])
        hull.append(there)
        here = there
    if not slopes:
        return here[:, None], np.zeros((len(rows), 0))
    # Rounding may make collinear slopes rise by an ulp; the order of a row's segments must survive the sort.
    return np.stack(hull, axis=1), np.minimum.accumulate(np.stack(slopes, axis=1), axis=1)


def lagrangian(reduced: Reduced, multiplier: float, budget: int, rounding: float) -> tuple[float, Floats]:
    """Lower bound on the loss of any assignment within the budget, and every choice's reduced cost.

    The bound is ``sum_i min_c (loss + multiplier * cost) - multiplier * budget``, written with costs above
    each group's cheapest so that little cancels, and lowered by what rounding may have added.

    Returns:
        The bound in the table's scale, and the reduced costs >= 0, float64 [N, K], infinite in the padding.
    """
    cheapest = reduced.cost[:, :1]
    priced = reduced.loss + multiplier * (reduced.cost - cheapest)
    least = priced.min(axis=1, keepdims=True)
    total = math.fsum(least[:, 0].tolist())
    spare = multiplier * (budget - int(cheapest.sum()))
    return total - spare - rounding * (total + spare), priced - least


@dataclass(frozen=True)
class Frontier:
    """Vertices of the quality-cost frontier, cheapest first; each is the optimum at a budget of its own cost.

    Attributes:
        cost: int64 [V], exact total costs, strictly rising.
        loss: float64 [V], total losses, falling.
    """

    cost: Ints
    loss: Floats
    _problem: Problem
    _table: Table
    _reduced: Reduced
    _ladder: Ladder

    def selection(self, vertex: int) -> dict[str, str]:
        """The selection of one vertex, item name to choice name."""
        position = self._ladder.positions(range(len(self.cost))[vertex])
        return expand(self._problem, self._table, self._reduced, position)


def frontier(problem: Problem) -> Frontier:
    """The frontier for every budget (the problem's own is ignored) from one sort."""
    table = tabulate(problem)
    reduced = nondominated(table)
    steps = ladder(reduced)
    last = math.fsum(reduced.at(reduced.count - 1)[1].tolist())
    # Summed from the dear end: only positive terms are added, so small losses keep their digits.
    loss = np.cumsum(np.concatenate([[last], steps.saved[::-1]]))[::-1]
    return Frontier(steps.cost, np.ldexp(loss, table.exponent), problem, table, reduced, steps)


def expand(problem: Problem, table: Table, reduced: Reduced, position: Ints) -> dict[str, str]:
    """Item name to choice name, in item order, for one reduced-row position per group."""
    index = reduced.index[np.arange(len(position)), position].tolist()
    chosen = {i: choice for group, choice in zip(table.groups, index, strict=True) for i in group}
    return {item.name: item.choices[chosen[i]].name for i, item in enumerate(problem.items)}

"""The straight road from a problem to a solution: reduce, bound, fix, solve the core, repair, certify."""

import math
import time
from dataclasses import dataclass

import numpy as np

from solver.core import extract, search
from solver.hull import Reduced, expand, ladder, lagrangian, nondominated, require_feasible
from solver.milp import backend, solve_core
from solver.problem import Problem, Solution
from solver.table import Floats, Ints, Table, tabulate

__all__ = ["solve"]

# Choices beyond the base ones that the first window searched may hold: few enough to be searched in no time.
FIRST_CHOICES = 64
# States kept per step of a search; more than this and the core goes to a MILP solver.
STATES = 100_000
# Back-pointers kept by a search, 8 bytes each.
TRACE_ENTRIES = 2**25
# Exchanges tried after the greedy walk stops; none helps any more long before.
EXCHANGES = 64


@dataclass(frozen=True)
class Incumbent:
    """A feasible assignment: positions [N], its loss in the table's scale, its exact cost."""

    position: Ints
    loss: float
    cost: int

    def better(self, other: "Incumbent") -> bool:
        return (self.loss, self.cost) < (other.loss, other.cost)


def solve(problem: Problem, *, exact: bool = True, time_limit: float = 60.0) -> Solution:
    """Choose one choice per item at the least total loss within the budget.

    Ties between equal solutions go to the lower loss, then the lower cost, then the lower choice index of the
    earliest item (the last of these whenever the core is solved by states, ``method == "states"``).

    Args:
        problem: what to solve.
        exact: prove optimality; otherwise stop at the convex-hull answer and its Lagrangian gap.
        time_limit: seconds the exact step may take; past it the best answer so far returns with its gap.

    Raises:
        Infeasible: when the cheapest assignment is over the budget.

    Peak memory is about 100 bytes per padded table entry, and up to 500 MB more when the core is hard.
    """
    start = time.perf_counter()
    table = tabulate(problem)
    reduced = nondominated(table)
    require_feasible(problem, table, reduced)
    steps = ladder(reduced)
    # A budget beyond the dearest assignment of interest is no constraint; clamping keeps sums in 64 bits.
    budget = min(problem.budget, int(steps.cost[-1]))
    taken = int(np.searchsorted(steps.cost, budget, side="right")) - 1
    multiplier = float(steps.slope[taken]) if taken < len(steps.slope) else 0.0
    bound, prices = lagrangian(reduced, multiplier, budget, table.rounding)
    best = _improve(reduced, prices, _incumbent(reduced, steps.positions(taken)), bound, budget)
    proved, method = taken == len(steps.slope), "hull"
    if exact and not proved:
        best, proved, method = _exact(reduced, prices, multiplier, budget, bound, best, start + time_limit)
    return _certify(problem, table, reduced, best.position, bound, multiplier, proved, method, start)


def _incumbent(reduced: Reduced, position: Ints) -> Incumbent:
    cost, loss = reduced.at(position)
    return Incumbent(position, math.fsum(loss.tolist()), int(cost.sum()))


def _improve(reduced: Reduced, prices: Floats, start: Incumbent, bound: float, budget: int) -> Incumbent:
    """Spend the budget that is left by exchanges, each the best change of at most two groups."""
    best = start
    for _ in range(EXCHANGES):
        # A choice priced beyond the gap is in nothing better than what we have.
        group, there = np.nonzero(prices <= best.loss - bound)
        position = best.position.copy()
        cost, loss = reduced.at(position)
        rise = reduced.cost[group, there] - cost[group]
        order = np.argsort(rise, kind="stable")
        rise, change = rise[order], (reduced.loss[group, there] - loss[group])[order]
        # For each change, the best second one among those cheap enough to go with it.
        least = np.minimum.accumulate(change)
        cheapest = np.maximum.accumulate(np.where(change == least, np.arange(len(change)), 0))
        fitting = np.searchsorted(rise, budget - best.cost - rise, side="right") - 1
        second = cheapest[np.maximum(fitting, 0)]
        clash = (fitting < 0) | (group[order] == group[order][second])
        both = np.where(clash, np.inf, change + change[second])
        first = int(both.argmin())
        for move in (order[first], order[second[first]]):
            position[group[move]] = there[move]
        if clash[first] or not (found := _incumbent(reduced, position)).better(best):
            break
        best = found
    return best


def _repair(reduced: Reduced, position: Ints, budget: int) -> Ints:
    """Bring an assignment within the budget by the downgrades that add least loss."""
    position = position.copy()
    while (over := int(reduced.at(position)[0].sum()) - budget) > 0:
        cost, loss = reduced.at(position)
        freed = cost[:, None] - reduced.cost
        added = np.where(np.isfinite(reduced.loss) & (freed > 0), reduced.loss - loss[:, None], np.inf)
        enough = np.where(freed >= over, added, np.inf)
        if not np.isfinite(enough).any():  # no single downgrade is enough: take the best rate and go on
            enough = np.divide(added, freed, out=np.full(added.shape, np.inf), where=freed > 0)
        group, there = divmod(int(enough.argmin()), enough.shape[1])
        position[group] = there
    return position


def _exact(
    reduced: Reduced,
    prices: Floats,
    multiplier: float,
    budget: int,
    bound: float,
    best: Incumbent,
    deadline: float,
) -> tuple[Incumbent, bool, str]:
    """The best assignment found, whether it is proved optimal, and by which method.

    Windows above the bound are searched completely, each twice as wide as the last. The first that holds an
    assignment holds the optimum; one as wide as the incumbent's gap that holds nothing better proves it.
    """
    rising = prices[(prices > 0) & (prices <= best.loss - bound)]
    few = len(rising) <= FIRST_CHOICES
    window = best.loss - bound if few else float(np.partition(rising, FIRST_CHOICES)[FIRST_CHOICES])
    complete = True
    while complete and time.perf_counter() < deadline:
        window = min(window, best.loss - bound)
        core = extract(reduced, prices, multiplier, budget, window)
        limit = min(STATES, TRACE_ENTRIES // max(len(core.free), 1))
        position, complete = search(core, limit, deadline)
        found = best if position is None else _incumbent(reduced, position)
        # A complete search also broke the ties: its answer stands unless rounding made it worse.
        if not best.better(found):
            best = found
        if complete and best.loss - bound <= window:
            return best, True, "states"
        window *= 2

    core = extract(reduced, prices, multiplier, budget, best.loss - bound)
    solver, left = backend(), deadline - time.perf_counter()
    if solver is None or left <= 0:
        return best, False, "states"
    position, proved = solve_core(core, solver, left)
    if position is None:
        return best, False, "states"
    within = int(reduced.at(position)[0].sum()) <= budget
    found = _incumbent(reduced, _repair(reduced, position, budget))
    # An answer over the budget by the solver's tolerance proves nothing about those within it.
    return (found if found.better(best) else best), proved and within, solver


def _certify(
    problem: Problem,
    table: Table,
    reduced: Reduced,
    position: Ints,
    bound: float,
    multiplier: float,
    proved: bool,
    method: str,
    start: float,
) -> Solution:
    """State cost and loss from the original numbers, not from anything computed on the way."""
    selection = expand(problem, table, reduced, position)
    chosen = [next(choice for choice in item.choices if choice.name == selection[item.name]) for item in problem.items]
    loss = math.fsum(choice.loss for choice in chosen)
    below = loss if proved else min(max(math.ldexp(bound, table.exponent), 0.0), loss)
    return Solution(
        selection=selection,
        cost=sum(choice.cost for choice in chosen),
        loss=loss,
        bound=below,
        gap=(loss - below) / loss if loss > 0 else 0.0,
        multiplier=math.ldexp(multiplier, table.exponent),
        seconds=time.perf_counter() - start,
        optimal=proved,
        method=method,
    )

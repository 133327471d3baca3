"""From a problem to padded arrays: ties collapsed, fixed choices applied, losses scaled."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from solver.problem import Problem

__all__ = ["Bools", "Floats", "Ints", "Table", "tabulate"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Table:
    """N groups by C choice indices; a group is one item or several tied ones.

    Attributes:
        groups: item positions of each group.
        cost: int64 [N, C], summed over the group; 0 where not allowed.
        loss: float64 [N, C], summed over the group and times ``2**-exponent`` so that the largest is below 1.
        allowed: bool [N, C], false for padding and for what a fixed choice excludes.
        exponent: the power of two taken out of the losses (exact, so no comparison changes).
    """

    groups: tuple[tuple[int, ...], ...]
    cost: Ints
    loss: Floats
    allowed: Bools
    exponent: int

    @property
    def rounding(self) -> float:
        """Relative error bound of ``math.fsum`` over terms ``loss + multiplier * cost``."""
        largest = max(len(group) for group in self.groups)
        return (8 + largest) * float(np.finfo(np.float64).eps)


def tabulate(problem: Problem) -> Table:
    """Tabulate a problem. Peak memory about 30 bytes per entry (items times the longest choice list)."""
    items = problem.items
    counts = np.array([len(item.choices) for item in items])
    present = np.arange(counts.max()) < counts[:, None]
    cost = np.zeros(present.shape, dtype=np.int64)
    loss = np.zeros(present.shape, dtype=np.float64)
    cost[present] = problem.costs
    loss[present] = problem.losses

    groups = problem.groups()
    if len(groups) < len(items):
        first = np.array([group[0] for group in groups])
        owner = np.empty(len(items), dtype=np.int64)
        for g, group in enumerate(groups):
            owner[list(group)] = g
        tied_cost, tied_loss = np.zeros_like(cost[first]), np.zeros_like(loss[first])
        np.add.at(tied_cost, owner, cost)
        np.add.at(tied_loss, owner, loss)
        cost, loss, present = tied_cost, tied_loss, present[first]

    for g, group in enumerate(groups) if problem.fixed else ():
        for item in (items[i] for i in group):
            if item.name in problem.fixed:
                wanted = [c.name for c in item.choices].index(problem.fixed[item.name])
                present[g] &= np.arange(present.shape[1]) == wanted

    exponent = math.frexp(float(loss.max()))[1]
    return Table(groups, cost, np.ldexp(loss, -exponent), present, exponent)

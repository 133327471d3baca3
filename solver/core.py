"""What is left undecided once reduced costs have ruled choices out, and its exact solution by states.

Choices are measured from a base assignment that minimises ``loss + multiplier * cost`` in every group. A full
assignment is then ``reduced cost + multiplier * unspent budget`` above the Lagrangian bound, so only partial
assignments within ``window`` of it can matter (Dyer, Riha and Walker 1995; Pisinger 1995).
"""

import time
from dataclasses import dataclass

import numpy as np

from solver.hull import Reduced
from solver.table import Floats, Ints

__all__ = ["Core", "Free", "extract", "search"]


@dataclass(frozen=True)
class Free:
    """One undecided group: its surviving choices, lowest choice index first.

    Attributes:
        group: the row in the reduced table.
        position: int64 [k], positions in that row.
        cost: int64 [k]; loss: float64 [k], both relative to the base choice, of either sign.
        reduced: float64 [k], reduced costs >= 0.
    """

    group: int
    position: Ints
    cost: Ints
    loss: Floats
    reduced: Floats


@dataclass(frozen=True)
class Core:
    """The undecided groups around a base assignment.

    Attributes:
        base: int64 [N], the position every group starts from.
        free: the groups with more than one surviving choice, in group order.
        room: budget left by the base assignment; negative when the base is over it.
        multiplier: loss per cost unit.
        window: how far above the Lagrangian bound an assignment may lie and still be of interest.
    """

    base: Ints
    free: tuple[Free, ...]
    room: int
    multiplier: float
    window: float

    def place(self, choice: list[int]) -> Ints:
        """Positions [N] when free group f takes its surviving choice number ``choice[f]``."""
        position = self.base.copy()
        for free, c in zip(self.free, choice, strict=True):
            position[free.group] = free.position[c]
        return position


def extract(reduced: Reduced, prices: Floats, multiplier: float, budget: int, window: float) -> Core:
    """Keep the choices whose reduced cost (``prices`` [N, K]) is within the window."""
    keep = prices <= window
    base = np.argmin(prices, axis=1)
    cost, loss = reduced.at(base)
    free = []
    for group in np.flatnonzero(keep.sum(axis=1) > 1).tolist():
        position = np.flatnonzero(keep[group])
        position = position[np.argsort(reduced.index[group, position])]
        free.append(
            Free(
                group,
                position,
                reduced.cost[group, position] - cost[group],
                reduced.loss[group, position] - loss[group],
                prices[group, position],
            )
        )
    return Core(base, tuple(free), budget - int(cost.sum()), multiplier, window)


def search(core: Core, limit: int, deadline: float) -> tuple[Ints | None, bool]:
    """Best assignment of the core, from undominated (cost, loss) states of its two halves.

    Every assignment within ``core.window`` of the Lagrangian bound is covered; the answer may lie beyond it.
    Ties in loss go to the lower cost, then to the lower choice index of the earliest group.

    Args:
        core: what is undecided.
        limit: states kept a step; more are cut off, those least above the bound staying.
        deadline: ``time.perf_counter()`` value past which to give up.

    Returns:
        Positions [N], or None when no state fits the budget; and whether nothing was cut off.
    """
    half = len(core.free) // 2
    early = _States(core, core.free[:half])
    late = _States(core, core.free[half:])
    for states in (early, late):
        if not states.grow(core, limit, deadline):
            return None, False
    # Late states rise in cost and fall in loss: the last one that fits is the best one that fits.
    partner = np.searchsorted(late.cost, core.room - early.cost, side="right") - 1
    fits = np.flatnonzero(partner >= 0)
    complete = early.complete and late.complete
    if not len(fits):
        return None, complete
    partner = partner[fits]
    cost, loss = early.cost[fits] + late.cost[partner], early.loss[fits] + late.loss[partner]
    tied = np.flatnonzero(loss == loss.min())
    tied = tied[cost[tied] == cost[tied].min()]
    choice, winner = early.first_path(fits[tied])
    return core.place(choice + late.first_path(partner[tied[winner : winner + 1]])[0]), complete


class _States:
    """Undominated partial assignments of some free groups, cost strictly rising and loss strictly falling."""

    def __init__(self, core: Core, groups: tuple[Free, ...]) -> None:
        self.groups = groups
        self.cost = np.zeros(1, dtype=np.int64)
        self.loss = np.zeros(1)
        self.complete = True
        # Per step: the surviving entries of the [choice, parent state] table, and its width.
        self._steps: list[tuple[Ints, int]] = []
        # What the groups not yet added can spend at least and at most.
        self._lowest = sum(int(free.cost.min()) for free in core.free)
        self._highest = sum(int(free.cost.max()) for free in core.free)

    def grow(self, core: Core, limit: int, deadline: float) -> bool:
        """Add all groups, last to first so that earlier ones break ties first; false when out of time."""
        for free in reversed(self.groups):
            if time.perf_counter() > deadline:
                return False
            self._lowest -= int(free.cost.min())
            self._highest -= int(free.cost.max())
            cost = (free.cost[:, None] + self.cost).ravel()
            loss = (free.loss[:, None] + self.loss).ravel()
            # Budget that the groups still to come cannot spend is lost: it counts at the multiplier's price.
            above = loss + core.multiplier * np.maximum(cost, core.room - self._highest)
            alive = np.flatnonzero((above <= core.window) & (cost + self._lowest <= core.room))
            alive = _undominated(alive, cost[alive], loss[alive])
            if len(alive) > limit:
                self.complete = False
                best = np.argsort(above[alive], kind="stable")[:limit]
                alive = alive[np.sort(best)]
            self._steps.append((alive, len(self.cost)))
            self.cost, self.loss = cost[alive], loss[alive]
        return True

    def first_path(self, states: Ints) -> tuple[list[int], int]:
        """Choices, group by group, of the lexicographically first of some states, and which one it is."""
        which = np.arange(len(states))
        path = []
        for alive, parents in reversed(self._steps):
            choice, states = np.divmod(alive[states], parents)
            first = choice == choice.min()
            path.append(int(choice.min()))
            states, which = states[first], which[first]
        return path, int(which[0])


def _undominated(entries: Ints, cost: Ints, loss: Floats) -> Ints:
    """Entries by rising cost and falling loss; of equals the first stays."""
    order = np.argsort(cost, kind="stable")  # the choices come as sorted runs, which this merges
    cost, loss = cost[order], loss[order]
    before = np.minimum.accumulate(loss)
    falls = np.ones(len(loss), dtype=np.bool_)
    falls[1:] = loss[1:] < before[:-1]
    order, cost = order[falls], cost[falls]
    # Where costs are equal, the last one left has the least loss.
    last = np.ones(len(cost), dtype=np.bool_)
    last[:-1] = cost[1:] != cost[:-1]
    kept: Ints = entries[order[last]]
    return kept

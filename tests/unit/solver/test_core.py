"""The state search on cores of its own: what it covers, what it cuts off, and when it gives up."""

import itertools
import math
import random
import time

import numpy as np
import pytest

from solver import Choice, Item, Problem
from solver.core import _undominated, extract, search
from solver.hull import ladder, lagrangian, nondominated
from solver.milp import backend, solve_core
from solver.table import tabulate


def core_of(seed, items=7, choices=5, window=math.inf, top=50):
    rng = random.Random(seed)
    rows = tuple(
        Item(
            f"i{n}",
            tuple(Choice(f"c{c}", rng.randint(0, top), float(rng.randint(0, top))) for c in range(choices)),
        )
        for n in range(items)
    )
    table = tabulate(Problem(0, rows))
    reduced = nondominated(table)
    steps = ladder(reduced)
    taken = len(steps.slope) // 2
    budget = int(steps.cost[taken]) + 1
    bound, prices = lagrangian(reduced, float(steps.slope[taken]), budget, table.rounding)
    limit = min(window, float(prices[np.isfinite(prices)].max()) * items)
    return extract(reduced, prices, float(steps.slope[taken]), budget, limit), reduced, bound, budget


def best_by_enumeration(core, reduced, budget):
    ranked = []
    for choice in itertools.product(*(range(len(free.cost)) for free in core.free)):
        cost, loss = reduced.at(core.place(list(choice)))
        if cost.sum() <= budget:
            ranked.append((math.fsum(loss), int(cost.sum()), choice))
    return min(ranked)


def forever():
    return time.perf_counter() + 60


@pytest.mark.parametrize("top", [4, 50])
@pytest.mark.parametrize("seed", range(30))
def test_a_complete_search_equals_enumeration_and_breaks_ties_by_index(seed, top):
    core, reduced, _, budget = core_of(seed, items=6, top=top)
    position, complete = search(core, 10**6, forever())
    loss, cost, choice = best_by_enumeration(core, reduced, budget)
    assert complete
    assert position.tolist() == core.place(list(choice)).tolist()
    assert int(reduced.at(position)[0].sum()) == cost
    assert math.fsum(reduced.at(position)[1]) == loss


def test_undominated_states_rise_in_cost_and_fall_in_loss_strictly():
    cost = np.array([3, 1, 3, 2, 3, 1, 4, 5])
    loss = np.array([5.0, 9.0, 4.0, 9.0, 4.0, 9.0, 4.0, 3.0])
    assert _undominated(np.arange(10, 18), cost, loss).tolist() == [11, 12, 17]
    nothing = np.zeros(0, dtype=np.int64)
    assert _undominated(nothing, nothing, np.zeros(0)).tolist() == []


def test_a_narrow_search_says_that_it_cut_something_off_and_stays_in_the_budget():
    core, reduced, _, budget = core_of(3, items=12)
    position, complete = search(core, 2, forever())
    assert not complete
    assert int(reduced.at(position)[0].sum()) <= budget


def test_a_search_out_of_time_claims_nothing():
    core, *_ = core_of(3)
    assert search(core, 10**6, time.perf_counter() - 1) == (None, False)


def test_extract_keeps_just_what_the_window_holds_in_index_order():
    core, reduced, _, _ = core_of(5, window=0.1)
    wide, *_ = core_of(5)
    assert sum(len(free.cost) for free in core.free) < sum(len(free.cost) for free in wide.free)
    assert all(free.reduced.max() <= 0.1 for free in core.free)
    for free in wide.free:
        assert np.all(np.diff(reduced.index[free.group, free.position]) > 0)


@pytest.mark.skipif(backend() is None, reason="no MILP solver runs on this machine")
@pytest.mark.parametrize("seed", range(4))
def test_the_pulp_model_of_a_core_finds_the_enumerated_optimum(seed):
    core, reduced, _, budget = core_of(seed, items=5)
    position, proved = solve_core(core, backend(), 60.0)
    loss, _, _ = best_by_enumeration(core, reduced, budget)
    assert proved
    assert int(reduced.at(position)[0].sum()) <= budget
    assert math.fsum(reduced.at(position)[1]) == pytest.approx(loss, rel=1e-12)

"""Laws of the optimum that hold for every instance."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from solver import Choice, Infeasible, Item, Problem, check, frontier, solve

# Small integers, so that sums are exact and ties are common.
ENTRIES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5)
TABLES = st.lists(ENTRIES, min_size=1, max_size=5)
EXAMPLES = settings(max_examples=200, deadline=None)


def rows_of(table, scale=1.0):
    return tuple(
        Item(f"i{n}", tuple(Choice(f"c{c}", cost, loss * scale) for c, (cost, loss) in enumerate(row)))
        for n, row in enumerate(table)
    )


def best_of(table, budget, groups=None):
    """(loss, cost, indices) by enumeration; ``groups`` are lists of rows that take one index."""
    groups = groups or [[n] for n in range(len(table))]
    ranked = []
    for combination in itertools.product(*(range(len(table[group[0]])) for group in groups)):
        index = {n: c for group, c in zip(groups, combination, strict=True) for n in group}
        cost = sum(table[n][c][0] for n, c in index.items())
        if cost <= budget:
            ranked.append((sum(table[n][c][1] for n, c in index.items()), cost, [index[n] for n in sorted(index)]))
    return min(ranked, default=None)


def answer(problem):
    """(loss, cost, indices) of a solve whose certificate holds, or None when infeasible."""
    try:
        solution = solve(problem)
    except Infeasible:
        return None
    assert solution.optimal
    check(problem, solution)
    picked = [int(solution.selection[f"i{n}"][1:]) for n in range(len(problem.items))]
    return solution.loss, solution.cost, picked


@EXAMPLES
@given(TABLES, st.integers(0, 40))
def test_equals_brute_force(table, budget):
    assert answer(Problem(budget, rows_of(table))) == best_of(table, budget)


@EXAMPLES
@given(st.data(), st.integers(2, 5), st.integers(1, 4), st.integers(0, 40))
def test_ties_equal_brute_force_over_tie_respecting_assignments(data, items, choices, budget):
    entry = st.tuples(st.integers(0, 12), st.integers(0, 12))
    table = data.draw(st.lists(st.lists(entry, min_size=choices, max_size=choices), min_size=items, max_size=items))
    cut = data.draw(st.integers(1, items - 1))
    order = data.draw(st.permutations(range(items)))
    tie, alone = sorted(order[: cut + 1]), sorted(order[cut + 1 :])
    groups = sorted([tie, *([n] for n in alone)])
    problem = Problem(budget, rows_of(table), (tuple(f"i{n}" for n in order[: cut + 1]),))
    assert answer(problem) == best_of(table, budget, groups)


@EXAMPLES
@given(TABLES, st.integers(0, 40))
def test_bounds_enclose_the_optimum_and_more_budget_never_loses_more(table, budget):
    problem = Problem(budget, rows_of(table))
    best = best_of(table, budget)
    if best is None:
        return
    relaxed = solve(problem, exact=False)
    check(problem, relaxed)
    assert relaxed.bound <= best[0] <= relaxed.loss
    assert solve(Problem(budget + 1, problem.items)).loss <= best[0]


@EXAMPLES
@given(TABLES, st.integers(0, 40), st.integers(-40, 40))
def test_scaling_all_losses_changes_nothing_else(table, budget, power):
    plain = answer(Problem(budget, rows_of(table)))
    scaled = answer(Problem(budget, rows_of(table, scale=2.0**power)))
    assert plain == scaled or (plain[1:] == scaled[1:] and math.ldexp(plain[0], power) == scaled[0])


@EXAMPLES
@given(TABLES, st.integers(0, 40), st.randoms(use_true_random=False))
def test_permuting_items_keeps_loss_and_cost(table, budget, rng):
    rows = list(rows_of(table))
    plain = answer(Problem(budget, tuple(rows)))
    rng.shuffle(rows)
    shuffled = answer(Problem(budget, tuple(rows)))
    assert (plain and plain[:2]) == (shuffled and shuffled[:2])


@EXAMPLES
@given(TABLES, st.integers(0, 40), st.integers(0, 3), st.integers(0, 3))
def test_dominated_choices_and_free_items_change_nothing(table, budget, more_cost, more_loss):
    plain = answer(Problem(budget, rows_of(table)))
    padded = [[*row, (row[0][0] + more_cost, row[0][1] + more_loss)] for row in table]
    longer = answer(Problem(budget, (*rows_of(padded), Item(f"i{len(table)}", (Choice("c0", 0, 0.0),)))))
    assert (plain is None) == (longer is None)
    if plain:
        assert longer == (plain[0], plain[1], [*plain[2], 0])


@EXAMPLES
@given(TABLES)
def test_every_frontier_vertex_is_the_optimum_at_its_cost_and_the_curve_is_convex(table):
    curve = frontier(Problem(0, rows_of(table)))
    for cost, loss in zip(curve.cost.tolist(), curve.loss.tolist(), strict=True):
        assert best_of(table, cost)[0] == loss
    slopes = -np.diff(curve.loss) / np.diff(curve.cost)
    assert np.all(slopes[1:] <= slopes[:-1] * (1 + 1e-12))

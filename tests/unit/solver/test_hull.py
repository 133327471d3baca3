"""Dominance, hulls, the Lagrangian bound and the frontier, against definitions written out by hand."""

import itertools
import random

import numpy as np
import pytest

from solver import Choice, Infeasible, Item, Problem, frontier, solve
from solver.hull import ladder, lagrangian, nondominated, require_feasible
from solver.table import tabulate


def item(name, *pairs):
    return Item(name, tuple(Choice(f"{name}{i}", cost, float(loss)) for i, (cost, loss) in enumerate(pairs)))


def random_problem(seed, items=4, choices=6, top=30):
    rng = random.Random(seed)
    pairs = [[(rng.randint(0, top), rng.randint(0, top)) for _ in range(rng.randint(1, choices))] for _ in range(items)]
    return Problem(0, tuple(item(f"i{n}", *row) for n, row in enumerate(pairs)))


def reduced_rows(problem):
    reduced = nondominated(tabulate(problem))
    return [reduced.index[i, :n].tolist() for i, n in enumerate(reduced.count.tolist())]


def test_dominated_choices_go_and_of_equals_the_first_stays():
    problem = Problem(0, (item("a", (5, 1), (2, 4), (2, 4), (3, 4), (2, 6), (5, 1), (4, 2)), item("b", (7, 7))))
    assert reduced_rows(problem) == [[1, 6, 0], [0]]


@pytest.mark.parametrize("seed", range(50))
def test_dominance_and_hull_match_their_definitions(seed):
    problem = random_problem(seed)
    reduced = nondominated(tabulate(problem))
    steps = ladder(reduced)
    for i, row in enumerate(problem.items):
        points = [(c.cost, c.loss) for c in row.choices]
        better = [
            [q for j, q in enumerate(points) if q[0] <= p[0] and q[1] <= p[1] and (q != p or j < k)]
            for k, p in enumerate(points)
        ]
        left = sorted(p for p, dominators in zip(points, better, strict=True) if not dominators)
        assert [points[j] for j in reduced.index[i, : reduced.count[i]]] == left
        on_hull = [
            b
            for b in left
            if not any(
                (c[0] - a[0]) * b[1] > (c[0] - b[0]) * a[1] + (b[0] - a[0]) * c[1]
                for a, c in itertools.combinations(left, 2)
                if a[0] < b[0] < c[0]
            )
        ]
        assert [left[j] for j in dict.fromkeys(steps.hull[i].tolist())] == on_hull


def test_greedy_steps_fall_in_slope_and_never_overtake_within_an_item():
    problem = random_problem(7, items=30, choices=12, top=1000)
    steps = ladder(nondominated(tabulate(problem)))
    assert np.all(np.diff(steps.slope) <= 0)
    assert np.all(np.diff(steps.cost) > 0)
    positions = [steps.positions(k) for k in range(len(steps.slope) + 1)]
    assert all(np.all(b >= a) for a, b in itertools.pairwise(positions))


def test_collinear_slopes_that_round_upwards_keep_their_order():
    points = ((0, 0.8), (5, 0.30000000000000004), (8, 0.0))
    assert (points[0][1] - points[1][1]) / 5 < points[1][1] / 3  # 0.1 both, before rounding
    reduced = nondominated(tabulate(Problem(0, (item("a", *points),))))
    steps = ladder(reduced)
    assert [int(reduced.at(steps.positions(k))[0].sum()) for k in range(3)] == steps.cost.tolist() == [0, 5, 8]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("multiplier", [0.0, 0.01, 0.3, 5.0])
def test_the_lagrangian_bound_is_below_every_assignment_in_the_budget(seed, multiplier):
    problem = random_problem(seed)
    table = tabulate(problem)
    reduced = nondominated(table)
    budget = int(reduced.cost[:, 0].sum()) + seed
    bound, prices = lagrangian(reduced, multiplier, budget, table.rounding)
    fitting = [
        sum(c.loss for c in chosen)
        for chosen in itertools.product(*(row.choices for row in problem.items))
        if sum(c.cost for c in chosen) <= budget
    ]
    assert np.ldexp(bound, table.exponent) <= min(fitting)
    assert np.all(prices.min(axis=1) == 0)


def test_infeasible_names_the_minimum_the_deficit_and_the_largest_items():
    rows = [item(f"i{n}", (n * 10, 1), (n * 10 + 5, 0)) for n in range(7)]
    problem = Problem(200, tuple(rows))
    table = tabulate(problem)
    with pytest.raises(Infeasible, match="210, which is 10 over the budget of 200") as caught:
        require_feasible(problem, table, nondominated(table))
    assert (caught.value.minimum, caught.value.deficit) == (210, 10)
    assert caught.value.dominating == (("i6", 60), ("i5", 50), ("i4", 40), ("i3", 30), ("i2", 20))


def test_infeasible_counts_fixed_and_tied_items_as_they_must_be():
    rows = (item("a", (1, 9), (8, 0)), item("b", (5, 9), (2, 0)))
    with pytest.raises(Infeasible) as caught:
        solve(Problem(5, rows, (("a", "b"),)))
    assert caught.value.dominating == (("b", 5), ("a", 1))
    with pytest.raises(Infeasible) as caught:
        solve(Problem(5, rows, (), {"a": "a1"}))
    assert (caught.value.minimum, caught.value.deficit) == (10, 5)


@pytest.mark.parametrize("seed", range(40))
def test_frontier_vertices_equal_solves_at_their_budgets(seed):
    problem = random_problem(seed)
    curve = frontier(problem)
    assert np.all(np.diff(curve.cost) > 0)
    assert np.all(np.diff(curve.loss) < 0)
    for vertex, (cost, loss) in enumerate(zip(curve.cost.tolist(), curve.loss.tolist(), strict=True)):
        best = solve(Problem(cost, problem.items))
        assert loss == pytest.approx(best.loss, rel=1e-12)
        selection = curve.selection(vertex)
        chosen = [next(c for c in row.choices if c.name == selection[row.name]) for row in problem.items]
        assert sum(c.cost for c in chosen) == cost
        assert sum(c.loss for c in chosen) == pytest.approx(loss, rel=1e-12)


def test_frontier_honours_ties_and_fixed_choices_and_counts_from_the_end():
    rows = (item("a", (1, 5), (3, 1)), item("b", (1, 5), (3, 1)), item("c", (1, 5), (3, 1)))
    curve = frontier(Problem(0, rows, (("a", "b"),), {"c": "c0"}))
    assert (curve.cost.tolist(), curve.loss.tolist()) == ([3, 7], [15.0, 7.0])
    assert curve.selection(-1) == {"a": "a1", "b": "b1", "c": "c0"}
    with pytest.raises(IndexError):
        curve.selection(2)


def test_small_losses_keep_their_digits_on_the_frontier():
    curve = frontier(Problem(0, (item("a", (0, 1e12), (1, 1e-3)), item("b", (0, 1e-3), (9, 1e-6)))))
    assert curve.loss.tolist() == pytest.approx([1e12, 2e-3, 1.001e-3], rel=1e-12)

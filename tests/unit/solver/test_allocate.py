"""Whole solves against brute force, a textbook dynamic programme and a hand instance."""

import itertools
import math
import random

import numpy as np
import pytest

import solver.allocate as allocate
from solver import Choice, Infeasible, Item, Problem, check, solve


def random_problem(seed, *, items=5, choices=5, top=None):
    """Small integers make equal costs, losses and whole solutions common; every other problem has a tie."""
    rng = random.Random(seed)
    top = top or rng.choice([3, 10, 1000, 10**9])
    rows = []
    for n in range(rng.randint(1, items)):
        count = rng.randint(1, choices)
        entries = [(rng.randint(0, top), float(rng.randint(0, top))) for _ in range(count)]
        rows.append(Item(f"i{n}", tuple(Choice(f"c{c}", *entry) for c, entry in enumerate(entries))))
    alike = [row.name for row in rows if len(row.choices) == len(rows[0].choices)]
    ties = (tuple(alike[:3]),) if rng.random() < 0.5 else ()
    fixed = {rows[-1].name: f"c{len(rows[-1].choices) - 1}"} if rng.random() < 0.2 else {}
    dearest = sum(max(c.cost for c in row.choices) for row in rows)
    return Problem(rng.randint(0, dearest + 1), tuple(rows), ties, fixed)


def brute_force(problem):
    """(loss, cost, choice indices) of the best assignment by the documented order, or None."""
    at = {row.name: n for n, row in enumerate(problem.items)}
    names = [[c.name for c in row.choices] for row in problem.items]
    best = None
    for combination in itertools.product(*(range(len(row.choices)) for row in problem.items)):
        tied = all(len({combination[at[name]] for name in tie}) == 1 for tie in problem.ties)
        held = all(names[at[name]][combination[at[name]]] == choice for name, choice in problem.fixed.items())
        chosen = [row.choices[c] for row, c in zip(problem.items, combination, strict=True)]
        cost = sum(c.cost for c in chosen)
        if tied and held and cost <= problem.budget:
            ranked = (math.fsum(c.loss for c in chosen), cost, combination)
            best = ranked if best is None else min(best, ranked)
    return best


def indices(problem, solution):
    return tuple(int(solution.selection[row.name][1:]) for row in problem.items)


@pytest.mark.parametrize("block", range(10))
def test_equals_brute_force_to_the_last_tie(block):
    feasible = 0
    for seed in range(200 * block, 200 * block + 200):
        problem = random_problem(seed)
        best = brute_force(problem)
        if best is None:
            with pytest.raises(Infeasible):
                solve(problem)
            continue
        feasible += 1
        solution = solve(problem)
        assert (solution.loss, solution.cost, indices(problem, solution)) == best, seed
        assert solution.optimal
        assert (solution.bound, solution.gap) == (solution.loss, 0.0)
        check(problem, solution)
        relaxed = solve(problem, exact=False)
        assert relaxed.bound <= solution.loss <= relaxed.loss, seed
        check(problem, relaxed)
    assert feasible > 80


def test_the_first_windows_that_hold_no_assignment_prove_nothing(monkeypatch):
    monkeypatch.setattr(allocate, "FIRST_CHOICES", 0)
    for seed in range(300):
        problem = random_problem(seed)
        best = brute_force(problem)
        if best is not None:
            solution = solve(problem)
            assert (solution.loss, solution.cost, indices(problem, solution)) == best, seed
            assert solution.optimal


@pytest.mark.parametrize("seed", range(5))
def test_six_items_of_six_choices_equal_brute_force(seed):
    rng = random.Random(seed)
    entry = [[(rng.randint(0, 40), float(rng.randint(0, 40))) for _ in range(6)] for _ in range(6)]
    rows = tuple(Item(f"i{n}", tuple(Choice(f"c{c}", *e) for c, e in enumerate(row))) for n, row in enumerate(entry))
    problem = Problem(110, rows)
    solution = solve(problem)
    assert (solution.loss, solution.cost, indices(problem, solution)) == brute_force(problem)


@pytest.mark.parametrize("seed", range(8))
def test_forty_items_equal_the_textbook_dynamic_programme(seed):
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 60, (40, 8))
    loss = np.round(rng.lognormal(0, 2, (40, 8)) * 1024) / 1024  # exact sums, so exact equality
    budget = int(cost.min(axis=1).sum()) + int(rng.integers(0, 800))
    best = np.zeros(budget + 1)
    for w, e in zip(cost, loss, strict=True):
        after = np.full(budget + 1, np.inf)
        for c in range(8):
            after[w[c] :] = np.minimum(after[w[c] :], best[: budget + 1 - w[c]] + e[c])
        best = after
    rows = tuple(
        Item(f"i{n}", tuple(Choice(f"c{c}", int(cost[n, c]), float(loss[n, c])) for c in range(8))) for n in range(40)
    )
    solution = solve(Problem(budget, rows))
    assert solution.optimal
    assert solution.loss == best[budget]


def test_never_over_the_budget_on_ten_thousand_instances():
    for seed in range(10_000):
        problem = random_problem(seed, items=4, choices=4, top=50)
        try:
            solution = solve(problem, exact=seed % 2 == 0)
        except Infeasible:
            continue
        chosen = [next(c for c in row.choices if c.name == solution.selection[row.name]) for row in problem.items]
        assert sum(c.cost for c in chosen) == solution.cost <= problem.budget, seed


SIZES, BITS, LOSSES = (1, 1, 2), (2, 3, 4), ((9, 4, 1), (8, 3, 1), (20, 7, 2))


def hand_instance(quarter_bits):
    """Three matrices; costs in quarters of a bit so that a budget of 2.25 bits a weight is an integer."""
    rows = tuple(
        Item(f"w{n}", tuple(Choice(str(b), 4 * size * b, float(e)) for b, e in zip(BITS, losses, strict=True)))
        for n, (size, losses) in enumerate(zip(SIZES, LOSSES, strict=True))
    )
    return Problem(quarter_bits * sum(SIZES), rows)


@pytest.mark.parametrize(
    ("quarter_bits", "loss", "bits"),
    [
        (9, 32.0, "232"),
        (10, 24.0, "223"),
        (12, 14.0, "333"),
        (13, 11.0, "433"),
        (16, 4.0, "444"),
        (99, 4.0, "444"),
    ],
)
def test_hand_instance(quarter_bits, loss, bits):
    solution = solve(hand_instance(quarter_bits))
    assert solution.loss == loss
    assert "".join(solution.selection.values()) == bits
    assert solution.optimal


def test_hand_instance_loses_less_with_more_budget_and_is_infeasible_below_the_cheapest():
    losses = [solve(hand_instance(q)).loss for q in range(8, 18)]
    assert losses == sorted(losses, reverse=True)
    with pytest.raises(Infeasible):
        solve(hand_instance(7))


def test_a_budget_that_binds_nothing_is_proved_without_a_search():
    solution = solve(hand_instance(16), exact=False)
    assert solution.optimal
    assert (solution.method, solution.multiplier, solution.bound) == ("hull", 0.0, 4.0)


def test_one_item_one_choice_and_zero_losses():
    only = Problem(3, (Item("a", (Choice("x", 3, 0.0),)),))
    solution = solve(only)
    assert (solution.selection, solution.cost, solution.loss, solution.gap) == ({"a": "x"}, 3, 0.0, 0.0)
    check(only, solution)
    with pytest.raises(Infeasible):
        solve(Problem(2, only.items))


@pytest.mark.parametrize("unit", [1e-300, 1e-9, 1.0, 1e9, 1e290])
def test_losses_over_twelve_decades_at_any_scale(unit):
    rng = random.Random(5)
    rows = tuple(
        Item(f"i{n}", tuple(Choice(f"c{c}", 7 * c + n, unit * 10.0 ** -(rng.random() * 12)) for c in range(5)))
        for n in range(5)
    )
    problem = Problem(60, rows)
    solution = solve(problem)
    loss, cost, combination = brute_force(problem)
    assert (solution.loss, solution.cost, indices(problem, solution)) == (loss, cost, combination)
    check(problem, solution)


def test_slopes_that_underflow_still_end_at_the_least_loss():
    rows = (
        Item("a", (Choice("c0", 0, 1e-320), Choice("c1", 10**12, 0.0))),
        Item("b", (Choice("c0", 0, 0.5), Choice("c1", 1, 0.0))),
    )
    solution = solve(Problem(10**13, rows))
    assert (solution.loss, solution.selection) == (0.0, {"a": "c1", "b": "c1"})


def test_budgets_and_costs_near_the_top_of_sixty_four_bits():
    huge = 2**60
    rows = tuple(Item(n, (Choice("c0", huge, 5.0), Choice("c1", huge + 1, 4.0))) for n in "abc")
    for extra, loss in ((0, 15.0), (1, 14.0), (3, 12.0), (10**30, 12.0)):
        solution = solve(Problem(3 * huge + extra, rows))
        assert solution.loss == loss
        check(Problem(3 * huge + extra, rows), solution)


def wide_problem():
    """Choices near one line a row, which leaves many of them in question."""
    rng = random.Random(11)
    rows = []
    for n in range(10):
        costs = sorted(rng.sample(range(1_000), 6))
        entries = [Choice(f"c{c}", w, 1_000.0 - w + rng.randint(0, 40)) for c, w in enumerate(costs)]
        rows.append(Item(f"i{n}", tuple(entries)))
    return Problem(sum(row.choices[2].cost for row in rows) + 17, tuple(rows))


def test_cores_too_wide_for_states_go_to_the_milp_solver(monkeypatch):
    problem = wide_problem()
    best = solve(problem)
    assert best.method == "states"
    monkeypatch.setattr(allocate, "STATES", 0)
    solution = solve(problem)
    assert solution.method == allocate.backend() is not None
    assert solution.optimal
    assert solution.loss == best.loss
    check(problem, solution)


def test_without_time_or_a_milp_solver_the_gap_is_stated_and_certified(monkeypatch):
    problem = wide_problem()
    for solution in (solve(problem, time_limit=0.0), solve(problem, exact=False)):
        check(problem, solution)
        assert solution.bound < solution.loss
    monkeypatch.setattr(allocate, "STATES", 1)
    monkeypatch.setattr(allocate, "backend", lambda: None)
    solution = solve(problem)
    assert not solution.optimal
    assert 0 < solution.gap < 1
    check(problem, solution)


def test_an_answer_over_the_budget_is_repaired_and_proves_nothing(monkeypatch):
    problem = wide_problem()

    def over_budget(core, solver, left):
        return core.place([int(np.argmax(free.cost)) for free in core.free]), True

    monkeypatch.setattr(allocate, "STATES", 0)
    monkeypatch.setattr(allocate, "solve_core", over_budget)
    monkeypatch.setattr(allocate, "backend", lambda: "cbc")
    solution = solve(problem)
    assert solution.cost <= problem.budget
    assert not solution.optimal
    check(problem, solution)

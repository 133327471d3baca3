"""The checker accepts what the solver says and rejects every corruption of it."""

import ast
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

import solver.certificate
from solver import CertificateError, Choice, Item, Problem, check, lagrangian_bound, solve


def problem(**changes):
    def row(name, *pairs):
        return Item(name, tuple(Choice(f"c{i}", cost, loss) for i, (cost, loss) in enumerate(pairs)))

    arguments = {
        "budget": 15,
        "items": (
            row("q", (1, 9.0), (3, 4.5), (6, 1.0)),
            row("k", (1, 8.0), (2, 6.0), (6, 1.5)),
            row("v", (2, 7.0), (3, 3.0), (5, 0.5)),
            row("o", (1, 3.0), (4, 1.0)),
        ),
        "ties": (("q", "k"),),
        "fixed": {"o": "c1"},
    }
    return Problem(**(arguments | changes))


def test_accepts_the_solver_and_its_relaxation():
    check(problem(), solve(problem()))
    relaxed = solve(problem(), exact=False)
    assert not relaxed.optimal
    assert 0 < relaxed.bound < relaxed.loss
    check(problem(), relaxed)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {"cost": s.cost - 1}, "the selection costs"),
        (lambda s: {"loss": s.loss * (1 + 1e-6)}, "the selection loses"),
        (lambda s: {"loss": float("nan")}, "the selection loses"),
        (lambda s: {"bound": s.bound * (1 + 1e-6)}, "the bound is"),
        (lambda s: {"bound": s.bound * (1 - 1e-6)}, "the bound is"),
        (lambda s: {"bound": float("nan")}, "the bound is"),
        (lambda s: {"gap": s.gap + 1e-6}, "the gap is"),
        (lambda s: {"multiplier": -1.0}, "the multiplier must be"),
        (lambda s: {"multiplier": float("nan")}, "the multiplier must be"),
        (lambda s: {"selection": s.selection | {"o": "c0"}}, "'o' is fixed to 'c1'"),
        (lambda s: {"selection": s.selection | {"q": "c0", "k": "c1"}}, "tied items"),
        (lambda s: {"selection": s.selection | {"v": "c9"}}, "'v' has no choice 'c9'"),
        (lambda s: {"selection": s.selection | {"z": "c0"}}, "differ in items.*'z'"),
        (lambda s: {"selection": {"q": "c0"}}, "differ in items"),
    ],
)
def test_rejects_a_corruption(exact, change, reason):
    solution = solve(problem(), exact=exact)
    with pytest.raises(CertificateError, match=reason):
        check(problem(), replace(solution, **change(solution)))


def test_rejects_a_consistent_selection_over_the_budget():
    rich = solve(problem(budget=99))
    with pytest.raises(CertificateError, match="over the budget of 15"):
        check(problem(), rich)


def test_rejects_a_worse_selection_that_claims_to_be_optimal():
    poor = solve(problem(budget=12))
    with pytest.raises(CertificateError, match="not optimal: another choice"):
        check(problem(), replace(poor, multiplier=solve(problem()).multiplier))


def test_a_relaxation_cannot_claim_to_be_optimal_at_its_own_bound():
    relaxed = solve(problem(), exact=False)
    with pytest.raises(CertificateError, match="the bound is"):
        check(problem(), replace(relaxed, optimal=True))


@pytest.mark.parametrize("multiplier", [0.0, 0.1, 0.7, 1.5, 20.0])
def test_the_bound_is_below_the_optimum_at_any_multiplier_and_matches_its_formula(multiplier):
    instance = problem()
    q, k, v, o = (row.choices for row in instance.items)

    def priced(*parts):
        return sum(c.loss + multiplier * c.cost for c in parts)

    tied = min(priced(a, b) for a, b in zip(q, k, strict=True))
    formula = tied + min(priced(c) for c in v) + priced(o[1]) - multiplier * instance.budget
    assert lagrangian_bound(instance, multiplier) == pytest.approx(formula, abs=1e-9)
    assert formula <= solve(instance).loss


def test_ties_that_share_an_item_decide_together():
    rows = tuple(Item(name, (Choice("a", 1, 4.0), Choice("b", 2, 1.0))) for name in "abcd")
    for ties in itertools.permutations((("a", "b"), ("c", "d"), ("b", "c"))):
        chained = Problem(7, rows, ties)
        solution = solve(chained)
        assert set(solution.selection.values()) == {"a"}
        check(chained, solution)


def test_the_checker_shares_no_code_with_the_solver():
    tree = ast.parse(Path(solver.certificate.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name for name in imported | plain if name.startswith("solver")} == {
        "solver.errors",
        "solver.problem",
    }
    assert ".groups()" not in ast.unparse(tree)

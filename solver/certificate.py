"""An independent re-check of a solution, in plain Python, sharing nothing with the solver but the data types.

What it proves: the selection is complete, within the budget to the unit, honours ties and fixed choices, sums
to the stated cost and loss, and no assignment can lose less than the Lagrangian bound at the stated
multiplier. A claim of optimality is checked against that bound and against every change of a single decision;
that nothing lies between the bound and the claim is the word of the exact search.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from solver.errors import CertificateError
from solver.problem import Choice, Problem, Solution

__all__ = ["check", "lagrangian_bound"]

# Relative tolerance for sums of floats that may have been taken in another order.
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Decision:
    """Items that take one choice index together, and the cost and loss of every index allowed to them."""

    members: list[str]
    totals: dict[int, tuple[int, float]]


def check(problem: Problem, solution: Solution) -> None:
    """Re-derive everything a solution states.

    Raises:
        CertificateError: naming the first statement that is not true.
    """
    chosen = _chosen(problem, solution)
    _check_rules(problem, chosen)
    cost = sum(choice.cost for choice in chosen.values())
    if cost != solution.cost:
        raise CertificateError(f"the selection costs {cost}, the solution says {solution.cost}")
    if cost > problem.budget:
        raise CertificateError(f"the selection costs {cost}, over the budget of {problem.budget}")
    loss = math.fsum(choice.loss for choice in chosen.values())
    if not math.isclose(loss, solution.loss, rel_tol=TOLERANCE):
        raise CertificateError(f"the selection loses {loss!r}, the solution says {solution.loss!r}")
    decisions = _decisions(problem)
    _check_bound(problem, solution, decisions)
    if solution.optimal:
        _check_single_changes(problem, solution, decisions, chosen)


def lagrangian_bound(problem: Problem, multiplier: float) -> float:
    """Lower bound on the loss of every assignment within the budget, from any multiplier >= 0.

    ``sum over decisions of min over choices (loss + multiplier * cost) - multiplier * budget``
    """
    return _lagrangian(problem, _decisions(problem), multiplier)[0]


def _lagrangian(problem: Problem, decisions: list[Decision], multiplier: float) -> tuple[float, float]:
    """The bound, and the size of the terms it was summed from, which scales its rounding error."""
    cheapest, dearest, least = 0, 0, []
    for decision in decisions:
        costs = [cost for cost, _ in decision.totals.values()]
        low = min(costs)
        cheapest += low
        dearest += max(costs)
        least.append(min(loss + multiplier * (cost - low) for cost, loss in decision.totals.values()))
    spare = multiplier * (min(problem.budget, dearest) - cheapest)
    total = math.fsum(least)
    return total - spare, total + spare


def _chosen(problem: Problem, solution: Solution) -> dict[str, Choice]:
    names = {item.name for item in problem.items}
    if stray := set(solution.selection) ^ names:
        raise CertificateError(f"the selection and the problem differ in items: {sorted(stray)[:5]}")
    chosen = {}
    for item in problem.items:
        matching = [choice for choice in item.choices if choice.name == solution.selection[item.name]]
        if not matching:
            raise CertificateError(f"item {item.name!r} has no choice {solution.selection[item.name]!r}")
        chosen[item.name] = matching[0]
    return chosen


def _check_rules(problem: Problem, chosen: dict[str, Choice]) -> None:
    for name, wanted in problem.fixed.items():
        if (found := chosen[name].name) != wanted:
            raise CertificateError(f"item {name!r} is fixed to {wanted!r}, found {found!r}")
    index = _chosen_index(problem, chosen) if problem.ties else {}
    for tie in problem.ties:
        if len({index[name] for name in tie}) > 1:
            raise CertificateError(f"tied items {list(tie)} take different choice indices")


def _chosen_index(problem: Problem, chosen: dict[str, Choice]) -> dict[str, int]:
    return {
        item.name: next(i for i, choice in enumerate(item.choices) if choice is chosen[item.name])
        for item in problem.items
    }


def _decisions(problem: Problem) -> list[Decision]:
    """Tied items as one decision each (ties that share an item merge), with fixed choices applied."""
    by_name = {item.name: item for item in problem.items}
    team: dict[str, list[str]] = {name: [name] for name in by_name}
    for tie in problem.ties:
        merged = list(dict.fromkeys(member for name in tie for member in team[name]))
        for member in merged:
            team[member] = merged
    decisions = []
    for name, members in team.items():
        if members[0] != name:
            continue
        allowed: Sequence[int] = range(len(by_name[name].choices))
        for member in members:
            if member in problem.fixed:
                wanted = problem.fixed[member]
                allowed = [c for c in allowed if by_name[member].choices[c].name == wanted]
        totals = {}
        for c in allowed:
            parts = [by_name[member].choices[c] for member in members]
            totals[c] = (sum(part.cost for part in parts), math.fsum(part.loss for part in parts))
        decisions.append(Decision(members, totals))
    return decisions


def _check_bound(problem: Problem, solution: Solution, decisions: list[Decision]) -> None:
    if not (math.isfinite(solution.multiplier) and solution.multiplier >= 0):
        raise CertificateError(f"the multiplier must be finite and >= 0, found {solution.multiplier!r}")
    relaxed, size = _lagrangian(problem, decisions, solution.multiplier)
    slack = TOLERANCE * size
    provable = solution.loss if solution.optimal else max(relaxed, 0.0)
    if not abs(solution.bound - provable) <= slack:
        raise CertificateError(f"the bound is {provable!r}, the solution says {solution.bound!r}")
    gap = (solution.loss - solution.bound) / solution.loss if solution.loss > 0 else 0.0
    if not abs(gap - solution.gap) <= TOLERANCE or gap < 0:
        raise CertificateError(f"the gap is {gap!r}, the solution says {solution.gap!r}")


def _check_single_changes(
    problem: Problem, solution: Solution, decisions: list[Decision], chosen: dict[str, Choice]
) -> None:
    """No optimal solution can be improved by changing one decision."""
    room = problem.budget - solution.cost
    index = _chosen_index(problem, chosen)
    for decision in decisions:
        name = decision.members[0]
        cost, loss = decision.totals[index[name]]
        for other_cost, other_loss in decision.totals.values():
            saved = loss - other_loss
            if other_cost - cost <= room and saved > TOLERANCE * solution.loss:
                raise CertificateError(f"not optimal: another choice of {name!r} would save {saved!r}")

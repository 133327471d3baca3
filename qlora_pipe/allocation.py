"""Between the error table, the solver and allocation.json: what is asked, what is recorded, and its re-check."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_pipe.config_rules import Rule
from qlora_pipe.rules import Narrowed, restrict
from quant.storage import Choice
from solver import CertificateError, Item, Problem, Solution, check
from solver import Choice as Option

Table = Mapping[str, Sequence[Mapping[str, Any]]]
"""Module name to rows; a row holds the fields of a Choice, its `bytes`, its `loss` and the `error` of that."""


def read_allocation(body: Mapping[str, Any]) -> dict[str, Choice]:
    """Module name to Choice, from allocation.json."""
    return {name: Choice.from_json(row) for name, row in body["choices"].items()}


def offered(table: Table) -> dict[str, list[Choice]]:
    """The configurations that were measured, by module name."""
    return {name: [Choice.from_json(row) for row in rows] for name, rows in table.items()}


def pose(table: Table, narrowed: Narrowed, budget: int) -> Problem:
    """What the solver is asked: at most `budget` bytes, the least total loss."""
    items = []
    for name, choices in narrowed.choices.items():
        rows = {Choice.from_json(row): row for row in table[name]}
        options = (Option(choice.name, rows[choice]["bytes"], rows[choice]["loss"]) for choice in choices)
        items.append(Item(name, tuple(options)))
    return Problem(budget, tuple(items), narrowed.ties)


def record(
    table: Table, rules: Sequence[Rule], narrowed: Narrowed, problem: Problem, solution: Solution
) -> dict[str, Any]:
    """The body of allocation.json: together with the table enough to check every statement in it.

    `fixed` are the matrices to which rules and ties leave one configuration, `floored` the least bits of those
    that a rule with min_bits is for, `loss_error` the standard error of the loss, as far as the table samples outputs.
    """
    chosen = {
        name: next(row for row in rows if Choice.from_json(row).name == solution.selection[name])
        for name, rows in table.items()
    }
    floored: dict[str, int] = {}
    for rule, names in zip(rules, narrowed.matched, strict=True):
        if rule.min_bits is not None:
            floored |= {name: max(rule.min_bits, floored.get(name, 0)) for name in names}
    return {
        "budget_bytes": problem.budget,
        "bytes": solution.cost,
        "loss": solution.loss,
        "loss_error": math.hypot(*(row["error"] for row in chosen.values())),
        "bound": solution.bound,
        "gap": solution.gap,
        "multiplier": solution.multiplier,
        "optimal": solution.optimal,
        "method": solution.method,
        "ties": [list(group) for group in narrowed.ties],
        "rules": [
            rule.model_dump(mode="json", exclude_none=True) | {"matrices": list(names)}
            for rule, names in zip(rules, narrowed.matched, strict=True)
        ],
        "fixed": [name for name, left in narrowed.choices.items() if len(left) == 1 < len(table[name])],
        "floored": floored,
        "choices": chosen,
    }


def recheck(table: Table, body: Mapping[str, Any]) -> None:
    """Re-derive all that allocation.json states from table.json, with code that took no part in solving.

    Raises CertificateError naming the first statement that is not true, ConfigError if a rule does not fit the
    table, KeyError, TypeError or ValueError where something is missing or malformed.
    """
    entries = [{key: value for key, value in entry.items() if key != "matrices"} for entry in body["rules"]]
    rules = [Rule.model_validate(entry) for entry in entries]
    narrowed = restrict(offered(table), rules, tuple(tuple(group) for group in body["ties"]))
    problem = pose(table, narrowed, body["budget_bytes"])
    solution = Solution(
        selection={name: Choice.from_json(row).name for name, row in body["choices"].items()},
        cost=body["bytes"],
        seconds=0.0,
        **{name: body[name] for name in ("loss", "bound", "gap", "multiplier", "optimal", "method")},
    )
    check(problem, solution)
    expected = json.loads(json.dumps(record(table, rules, narrowed, problem, solution)))
    for key, value in expected.items():
        if body[key] != value:
            found = f"expected {value!r:.200}, found {body[key]!r:.200}"
            raise CertificateError(f"{key} does not follow from the table: {found}")

"""allocate: the integer programme picks one configuration per matrix; its certificate is checked by other code."""

from typing import Any

from qlora_pipe.architectures import linear_name
from qlora_pipe.errors import BudgetError, ConfigError
from qlora_pipe.known import linear_budget
from qlora_pipe.stages.base import Context, Stage
from quant.storage import Choice
from solver import Choice as Option
from solver import Infeasible, Item, Problem, check, solve


def run(context: Context) -> None:
    """Needs the saved table only: a new budget touches neither weights nor a device."""
    config, known = context.config, context.known
    table = context.read_json("score", "table.json")
    budget = linear_budget(known.architecture, known.dtypes, config)
    ties = _ties(len(known.architecture.layers), config.decompose.ties)
    _keep_common_choices(table, ties)
    problem = Problem(
        budget=budget,
        items=tuple(
            Item(name, tuple(Option(Choice.from_json(row).name, row["bytes"], row["loss"]) for row in rows))
            for name, rows in table.items()
        ),
        ties=ties,
    )
    try:
        solution = solve(problem, time_limit=config.decompose.time_limit)
    except Infeasible as error:
        total = known.architecture.linear_weights()
        raise BudgetError(
            f"decompose.budget {config.decompose.budget} leaves {budget} bytes for the linear maps; {error}. "
            f"The smallest that works is {8 * error.minimum / total:.4f} bits per weight: raise the budget, or offer "
            "fewer bits, larger blocks or smaller ranks"
        ) from error
    check(problem, solution)
    chosen = {}
    for name, rows in table.items():
        chosen[name] = next(row for row in rows if Choice.from_json(row).name == solution.selection[name])
    context.write_json(
        "allocation.json",
        {
            "budget_bytes": budget,
            "bytes": solution.cost,
            "bits_per_weight": 8 * solution.cost / known.architecture.linear_weights(),
            "loss": solution.loss,
            "bound": solution.bound,
            "gap": solution.gap,
            "optimal": solution.optimal,
            "ties": config.decompose.model_dump(mode="json")["ties"],
            "choices": chosen,
        },
    )


def _keep_common_choices(table: dict[str, list[dict[str, Any]]], ties: tuple[tuple[str, ...], ...]) -> None:
    """Tied matrices of different shape may take only what all of them can: drop the rest from `table`."""
    for group in ties:
        common = set.intersection(*({Choice.from_json(row) for row in table[name]} for name in group))
        if not common:
            raise ConfigError(
                f"decompose.ties: {', '.join(group)} are tied but have no configuration in common; offer more "
                "block_sizes or ranks, or untie them"
            )
        for name in group:
            table[name] = [row for row in table[name] if Choice.from_json(row) in common]


def read_allocation(body: dict[str, Any]) -> dict[str, Choice]:
    """Module name to Choice, from allocation.json."""
    return {name: Choice.from_json(row) for name, row in body["choices"].items()}


def _ties(layers: int, roles: tuple[tuple[str, ...], ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(linear_name(layer, role) for role in group) for layer in range(layers) for group in roles)


STAGE = Stage(
    "allocate",
    2,
    ("score",),
    lambda config: config.decompose.model_dump(mode="json", include={"budget", "ties", "time_limit"}),
    run,
)

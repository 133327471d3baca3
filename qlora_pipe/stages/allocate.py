"""allocate: the integer programme picks one configuration per matrix; its certificate is checked by other code."""

from qlora_pipe.allocation import offered, pose, record
from qlora_pipe.known import linear_budget
from qlora_pipe.rules import narrow
from qlora_pipe.stages.base import Context, Stage
from solver import check, solve


def run(context: Context) -> None:
    """Needs the saved table only: a new budget, tie or rule touches neither weights nor a device."""
    settings, known = context.config.decompose, context.known
    table = context.read_json("score", "table.json")
    narrowed = narrow(offered(table), settings.rules, settings.ties)
    problem = pose(table, narrowed, linear_budget(known.architecture, known.dtypes, context.config))
    # Some allocation fits: the plan has made sure of it.
    solution = solve(problem, time_limit=settings.time_limit)
    check(problem, solution)
    bits = 8 * solution.cost / known.architecture.linear_weights()
    body = record(table, settings.rules, narrowed, problem, solution)
    context.write_json("allocation.json", {"bits_per_weight": bits} | body)


STAGE = Stage(
    "allocate",
    3,
    ("score",),
    lambda config: (
        config.decompose.model_dump(mode="json", include={"budget", "ties", "rules", "time_limit"}, exclude_none=True)
        | config.decompose.tables()
    ),
    run,
)

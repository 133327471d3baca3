"""The core as a PuLP model, for the rare cores whose states do not fit, for HiGHS or the bundled CBC."""

import math
from typing import Any

import pulp

from solver.core import Core
from solver.table import Ints

__all__ = ["backend", "solve_core"]

# Tighter than both solvers' 1e-6, so that a rounded binary seldom oversteps the budget row.
FEASIBILITY = 1e-9


def backend() -> str | None:
    """The MILP solver that would be used: "highs" when highspy is installed, else "cbc" when it runs here."""
    for name in ("highs", "cbc"):
        if _engine(name, 1.0).available():
            return name
    return None


def _engine(solver: str, time_limit: float) -> Any:
    if solver == "highs":
        if not pulp.HiGHS(msg=False).available():  # the stand-in class takes none of the options below
            return pulp.HiGHS(msg=False)
        return pulp.HiGHS(
            msg=False,
            timeLimit=time_limit,
            gapRel=0.0,
            gapAbs=0.0,
            threads=1,
            mip_feasibility_tolerance=FEASIBILITY,
            primal_feasibility_tolerance=FEASIBILITY,
        )
    # The bundled binary, by the class that PuLP does not deprecate.
    return pulp.COIN_CMD(
        msg=False,
        timeLimit=time_limit,
        gapRel=0.0,
        threads=1,
        path=pulp.PULP_CBC_CMD.pulp_cbc_path,
        options=[f"integerTolerance {FEASIBILITY}", f"primalTolerance {FEASIBILITY}"],
    )


def solve_core(core: Core, solver: str, time_limit: float) -> tuple[Ints | None, bool]:
    """Solve the core with one binary per choice, an equality per group and one integer budget row.

    Args:
        core: a core with at least one free group.
        solver: "cbc" or "highs".
        time_limit: seconds.

    Returns:
        Positions [N], or None when nothing came back, and whether the solver proved them optimal. They may be
        over the budget by the solver's own tolerance: the caller re-checks with exact sums.
    """
    model = pulp.LpProblem("core", pulp.LpMinimize)
    floor = [int(free.cost.min()) for free in core.free]
    # Dividing by the common divisor keeps coefficients small and one unit well above the solver's tolerance.
    rises = [int(c) - low for free, low in zip(core.free, floor, strict=True) for c in free.cost]
    unit = math.gcd(*rises) or 1
    capacity = (core.room - sum(floor)) // unit
    # A power of two brings the window near a million, far above the solvers' absolute tolerances.
    scale = 2.0 ** (20 - math.frexp(core.window)[1])
    unspent = model.add_variable("unspent", 0)
    objective = [(unspent, core.multiplier * unit * scale)]
    row = [(unspent, 1)]
    binaries = []
    for f, (free, low) in enumerate(zip(core.free, floor, strict=True)):
        binary = [model.add_variable(f"x_{f}_{c}", cat="Binary") for c in range(len(free.cost))]
        binaries.append(binary)
        objective += [(x, d * scale) for x, d in zip(binary, free.reduced.tolist(), strict=True)]
        row += [(x, (c - low) // unit) for x, c in zip(binary, free.cost.tolist(), strict=True)]
        model += pulp.LpAffineExpression([(x, 1) for x in binary]) == 1
    model += pulp.LpAffineExpression(objective)
    model += pulp.LpAffineExpression(row) == capacity

    try:
        model.solve(_engine(solver, time_limit))
    except pulp.PulpSolverError:
        return None, False
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, False
    choice = [max(range(len(binary)), key=lambda c: binary[c].varValue or 0.0) for binary in binaries]
    return core.place(choice), model.sol_status == pulp.LpSolutionOptimal

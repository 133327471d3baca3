"""``python -m solver INSTANCE.json``: solve one instance and print the answer as JSON.

Exit code 2, with the reason on standard error, when the instance is malformed or infeasible.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from solver.allocate import solve
from solver.certificate import check
from solver.errors import Infeasible, InvalidProblem
from solver.problem import Problem


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m solver", description="Solve one allocation instance.")
    parser.add_argument("instance", type=Path, metavar="INSTANCE.json")
    path = parser.parse_args(arguments).instance
    try:
        problem = Problem.from_dict(json.loads(path.read_text(encoding="utf-8")))
        solution = solve(problem)
    except (OSError, ValueError, InvalidProblem, Infeasible) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 2
    check(problem, solution)
    stated = ("selection", "cost", "loss", "bound", "gap", "seconds")
    sys.stdout.write(json.dumps({name: getattr(solution, name) for name in stated}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

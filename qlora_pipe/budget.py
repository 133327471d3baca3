"""Whether any allocation fits the budget, told from shapes alone, before a weight is read."""

import math
from collections.abc import Mapping

from qlora_pipe.architectures import Architecture
from qlora_pipe.config import Config
from qlora_pipe.config_rules import Rule
from qlora_pipe.errors import BudgetError
from qlora_pipe.known import allowed, choice_bytes, fixed_bytes, linear_budget
from qlora_pipe.units import parse_budget
from quant.storage import Choice

_LARGEST = 5


def require_feasible(architecture: Architecture, dtypes: Mapping[str, str], config: Config) -> None:
    """Raise BudgetError if the smallest allocation is over the budget: what it takes, and what makes it so large."""
    budget = linear_budget(architecture, dtypes, config)
    smallest = smallest_allocation(architecture, config)
    minimum = sum(size for _, size in smallest.values())
    if minimum <= budget:
        return
    if parse_budget(config.decompose.budget).kind == "bits":
        fixed, works = "", f"{math.ceil(80_000 * minimum / architecture.linear_weights()) / 10_000:.4f} bits per weight"
    else:
        other = fixed_bytes(architecture, dtypes, config)
        fixed = f" (embeddings, norms, head and file header alone take {other} bytes)"
        works = f"{other + minimum} bytes"
    largest = sorted(smallest.items(), key=lambda entry: -entry[1][1])[:_LARGEST]
    parts = ", ".join(f"{name} {size} ({choice.name})" for name, (choice, size) in largest)
    raising = _raised_by(architecture, config, minimum)
    raise BudgetError(
        f"decompose.budget {config.decompose.budget} leaves {max(budget, 0)} bytes for the linear maps{fixed}, which "
        f"take {minimum} at least. The smallest that works is {works}. Its largest matrices, in bytes: {parts}. "
        f"{raising}Raise the budget, {'relax the rules, ' if raising else ''}or offer fewer bits, larger blocks or "
        "smaller ranks"
    )


def smallest_allocation(architecture: Architecture, config: Config) -> dict[str, tuple[Choice, int]]:
    """The configuration of every matrix, and its bytes, that together take least; ties and rules kept."""
    sizes = choice_bytes(architecture, config)
    ties = allowed(architecture, config).ties
    tied = {name for group in ties for name in group}
    found: dict[str, tuple[Choice, int]] = {}
    for group in (*ties, *((name,) for name in sizes if name not in tied)):
        totals = {choice: sum(sizes[name][choice] for name in group) for choice in sizes[group[0]]}
        choice = min(totals, key=totals.__getitem__)
        found |= {name: (choice, sizes[name][choice]) for name in group}
    return found


def _raised_by(architecture: Architecture, config: Config, minimum: int) -> str:
    """The rules that make the smallest allocation larger, in a sentence; empty if none does."""

    def least(*rules: Rule) -> int:
        decompose = config.decompose.model_copy(update={"rules": rules})
        smallest = smallest_allocation(architecture, config.model_copy(update={"decompose": decompose}))
        return sum(size for _, size in smallest.values())

    free = least()
    if free == minimum:
        return ""
    alone = [(number, rule, least(rule) - free) for number, rule in enumerate(config.decompose.rules)]
    parts = ", ".join(f"decompose.rules.{number} {rule} alone by {more}" for number, rule, more in alone if more)
    return f"Rules raise it from {free} to {minimum} bytes{parts and ': '}{parts}. "

"""The multiple-choice knapsack as frozen data.

Every item takes exactly one of its choices; costs are integers (bytes or bits) whose exact sum may not
exceed the budget; the sum of the losses is minimised.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solver.errors import InvalidProblem

__all__ = ["Choice", "Item", "Problem", "Solution"]

# Totals must fit a signed 64-bit integer with one bit to spare for differences of totals.
MAX_TOTAL_COST = 2**62 - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to treat an item: an integer cost (bytes or bits) and a loss, both >= 0."""

    name: str
    cost: int
    loss: float


@dataclass(frozen=True, slots=True)
class Item:
    """A thing that takes exactly one of its choices."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Problem:
    """Minimise total loss such that total cost <= budget.

    Args:
        budget: largest total cost allowed, in the unit of the costs.
        items: what to decide on; order matters only for breaking ties between equal solutions.
        ties: groups of item names that must take the same choice *index*; groups that share an item merge.
        fixed: item name to the name of the choice it must take; within a tie it fixes all by index.

    Attributes:
        costs: int64, and losses: float64, of all choices in item order, read-only; gathered once, so that solving
            costs no walk over the choices.

    Raises:
        InvalidProblem: on anything malformed, naming the item and choice.
    """

    budget: int
    items: tuple[Item, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    costs: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    losses: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_integer(self.budget, "budget")
        _check_names(self.items)
        costs, losses = _numbers(self.items)
        _check_totals(self.items, costs, losses)
        for name, numbers in (("costs", costs), ("losses", losses)):
            numbers.flags.writeable = False
            object.__setattr__(self, name, numbers)
        index = self.item_index()
        _check_ties(self, index)
        _check_fixed(self, index)

    def item_index(self) -> dict[str, int]:
        """Position of each item by name."""
        return {item.name: i for i, item in enumerate(self.items)}

    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Item positions that decide together, ordered by first member; an untied item is a group of one."""
        index = self.item_index()
        root = list(range(len(self.items)))

        def find(i: int) -> int:
            while root[i] != i:
                root[i] = root[root[i]]
                i = root[i]
            return i

        for tie in self.ties:
            for name in tie[1:]:
                root[find(index[name])] = find(index[tie[0]])
        members: dict[int, list[int]] = {}
        for i in range(len(self.items)):
            members.setdefault(find(i), []).append(i)
        return tuple(tuple(group) for group in members.values())

    @classmethod
    def from_dict(cls, data: object) -> "Problem":
        """Read the JSON form.

        ``{"budget": int, "items": [{"name", "choices": [{"name", "cost": int, "loss": float}]}],
        "ties": [[item names]], "fixed": {item: choice}}``, the last two optional.

        Raises:
            InvalidProblem: on a missing or unknown key, a wrong type, or a malformed problem.
        """
        top = _object(data, "the problem", ("budget", "items"), ("ties", "fixed"))
        items = []
        for i, entry in enumerate(_array(top["items"], "items")):
            item = _object(entry, f"items[{i}]", ("name", "choices"))
            where = f"choice of item {item['name']!r}"
            choices = [
                Choice(**_object(choice, where, ("name", "cost", "loss")))
                for choice in _array(item["choices"], f"choices of item {item['name']!r}")
            ]
            items.append(Item(item["name"], tuple(choices)))
        ties = tuple(tuple(_array(tie, "each tie")) for tie in _array(top.get("ties", []), "ties"))
        fixed = top.get("fixed", {})
        if not isinstance(fixed, dict):
            raise InvalidProblem(f"fixed must be an object of item name to choice name, found {fixed!r}")
        return cls(top["budget"], tuple(items), ties, fixed)


@dataclass(frozen=True)
class Solution:
    """A feasible selection and what is known about how good it is.

    Attributes:
        selection: item name to choice name, for every item.
        cost: exact total cost.
        loss: total loss, summed without intermediate rounding.
        bound: no assignment has a lower loss; equals ``loss`` when ``optimal``, else the Lagrangian bound.
        gap: ``(loss - bound) / loss``, 0 when the loss is 0.
        multiplier: loss per cost unit >= 0 whose Lagrangian bound anyone can re-derive from the problem.
        seconds: wall time of the solve.
        optimal: whether optimality was proved (up to the rounding of a sum of floats).
        method: what settled the answer: "hull", "states", "cbc" or "highs".
    """

    selection: dict[str, str]
    cost: int
    loss: float
    bound: float
    gap: float
    multiplier: float
    seconds: float
    optimal: bool
    method: str


def _check_integer(value: object, where: str) -> None:
    # bool is an int to Python, and a numpy integer overflows silently in sums: only the real thing passes.
    if type(value) is not int:
        raise InvalidProblem(f"{where} must be an integer, found {value!r}")


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str) or not name:
        raise InvalidProblem(f"the name of {where} must be a non-empty string, found {name!r}")


def _check_choice(item: Item, choice: Choice) -> None:
    where = f"choice {choice.name!r} of item {item.name!r}"
    _check_integer(choice.cost, f"the cost of {where}")
    if choice.cost < 0:
        raise InvalidProblem(f"the cost of {where} must not be negative, found {choice.cost}")
    if isinstance(choice.loss, bool) or not isinstance(choice.loss, (int, float)):
        raise InvalidProblem(f"the loss of {where} must be a number, found {choice.loss!r}")
    if not 0 <= choice.loss <= sys.float_info.max:  # false for NaN and infinity too
        raise InvalidProblem(f"the loss of {where} must be finite and not negative, found {choice.loss!r}")


def _check_names(items: tuple[Item, ...]) -> None:
    if not items:
        raise InvalidProblem("the problem has no items")
    seen: set[str] = set()
    for position, item in enumerate(items):
        _check_name(item.name, f"item {position}")
        if item.name in seen:
            raise InvalidProblem(f"item {item.name!r} appears twice")
        seen.add(item.name)
        if not item.choices:
            raise InvalidProblem(f"item {item.name!r} has no choice")
        names = [choice.name for choice in item.choices]
        for name in names:
            _check_name(name, f"a choice of item {item.name!r}")
        if len(set(names)) != len(names):
            raise InvalidProblem(f"item {item.name!r} has two choices of the same name")


def _numbers(items: tuple[Item, ...]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All costs and losses, in item order. Looks at single choices only when something is unusual."""
    costs = [choice.cost for item in items for choice in item.choices]
    losses = [choice.loss for item in items for choice in item.choices]
    usual = set(map(type, costs)) == {int} and set(map(type, losses)) == {float}
    if not (usual and min(costs) >= 0 and all(map(math.isfinite, losses)) and min(losses) >= 0):
        for item in items:
            for choice in item.choices:
                _check_choice(item, choice)
    if (largest := max(costs)) > MAX_TOTAL_COST:
        raise InvalidProblem(f"a cost of {largest} is over {MAX_TOTAL_COST}: use a coarser unit")
    return np.array(costs, dtype=np.int64), np.array(losses, dtype=np.float64)


def _check_totals(items: tuple[Item, ...], costs: NDArray[np.int64], losses: NDArray[np.float64]) -> None:
    starts = list(accumulate((len(item.choices) for item in items[:-1]), initial=0))
    dearest = sum(np.maximum.reduceat(costs, starts).tolist())
    if dearest > MAX_TOTAL_COST:
        raise InvalidProblem(f"total cost can reach {dearest}, over {MAX_TOTAL_COST}: use a coarser unit")
    if not math.isfinite(sum(np.maximum.reduceat(losses, starts).tolist())):
        raise InvalidProblem("the total loss overflows a double: scale the losses down")


def _check_ties(problem: Problem, index: dict[str, int]) -> None:
    for tie in problem.ties:
        if not tie:
            raise InvalidProblem("a tie has no items")
        for name in tie:
            if name not in index:
                raise InvalidProblem(f"tie {list(tie)!r} names an unknown item {name!r}")
        first = problem.items[index[tie[0]]]
        for name in tie[1:]:
            count = len(problem.items[index[name]].choices)
            if count != len(first.choices):
                raise InvalidProblem(
                    f"tied items must offer the same number of choices: {first.name!r} has "
                    f"{len(first.choices)}, {name!r} has {count}"
                )


def _check_fixed(problem: Problem, index: dict[str, int]) -> None:
    for name, choice in problem.fixed.items():
        if name not in index:
            raise InvalidProblem(f"fixed names an unknown item {name!r}")
        if choice not in {c.name for c in problem.items[index[name]].choices}:
            raise InvalidProblem(f"fixed asks for an unknown choice {choice!r} of item {name!r}")
    if not problem.fixed:
        return
    for group in problem.groups():
        fixed = [problem.items[i] for i in group if problem.items[i].name in problem.fixed]
        wanted = {[c.name for c in item.choices].index(problem.fixed[item.name]) for item in fixed}
        if len(wanted) > 1:
            asked = ", ".join(f"{item.name!r} to {problem.fixed[item.name]!r}" for item in fixed)
            raise InvalidProblem(f"tied items are fixed to different choices: {asked}")


def _object(value: object, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidProblem(f"{where} must be an object, found {value!r}")
    missing = [key for key in required if key not in value]
    unknown = [key for key in value if key not in required and key not in optional]
    if missing or unknown:
        raise InvalidProblem(f"{where}: missing keys {missing}, unknown keys {unknown}, found {value!r:.200}")
    return value


def _array(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidProblem(f"{where} must be an array, found {value!r:.200}")
    return value

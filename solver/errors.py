"""The solver's error tree: everything raised on purpose is a ``SolverError``."""

__all__ = ["CertificateError", "Infeasible", "InvalidProblem", "SolverError"]


class SolverError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidProblem(SolverError):
    """The problem is malformed; the message names the item and choice at fault."""


class CertificateError(SolverError):
    """A solution does not say the truth about its problem."""


class Infeasible(SolverError):
    """No assignment fits the budget.

    Attributes:
        budget: the budget asked for, in cost units.
        minimum: the smallest total cost any assignment has, in cost units.
        deficit: ``minimum - budget``, always positive.
        dominating: up to five ``(item name, cost)`` pairs, the largest parts of ``minimum`` first.
    """

    def __init__(self, budget: int, minimum: int, dominating: tuple[tuple[str, int], ...]) -> None:
        self.budget = budget
        self.minimum = minimum
        self.deficit = minimum - budget
        self.dominating = dominating
        largest = ", ".join(f"{name} ({cost})" for name, cost in dominating)
        super().__init__(
            f"infeasible: the cheapest assignment costs {minimum}, which is {self.deficit} over the budget "
            f"of {budget}; raise the budget or offer cheaper choices for the largest items: {largest}"
        )

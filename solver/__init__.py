"""Exact multiple-choice knapsack for bits, ranks and widths: numbers in, a certified selection out."""

from solver.allocate import solve
from solver.certificate import check, lagrangian_bound
from solver.errors import CertificateError, Infeasible, InvalidProblem, SolverError
from solver.hull import Frontier, frontier
from solver.problem import Choice, Item, Problem, Solution

__all__ = [
    "CertificateError",
    "Choice",
    "Frontier",
    "Infeasible",
    "InvalidProblem",
    "Item",
    "Problem",
    "Solution",
    "SolverError",
    "check",
    "frontier",
    "lagrangian_bound",
    "solve",
]

"""Ours against a plain PuLP/CBC model of the same instance, in the same run.

    python benchmarks/allocation.py [--short] [--json FILE]

Instances are synthetic but realistic: Llama shapes, heavy-tailed sensitivities, double-quantised storage.
Times are medians; spread is (largest - smallest) / median of ours over the repeats. Both sides start from the
same problem object. The peer is asked for no more than ours: a relative gap of 2e-4 where ours stops at a
certified gap, gap 0 where ours proves the optimum. A bar that does not hold is printed as such.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pulp
import rows
from rows import Row

from solver import Choice, Item, Problem, Solution, check, frontier, solve

CERTIFIED_GAP = 2e-4
# Seconds after which the peer is stopped; its row then says so, and the ratio is at least what is printed.
PEER_LIMIT, PEER_LIMIT_SHORT = 120, 20

# (name, rows, columns) of the linear maps of a layer.
LLAMA_70B = (
    ("q", 8192, 8192),
    ("k", 1024, 8192),
    ("v", 1024, 8192),
    ("o", 8192, 8192),
    ("gate", 28672, 8192),
    ("up", 28672, 8192),
    ("down", 8192, 28672),
)
# Weight bits, scale bits, bits of a second-level maximum, weights a block, blocks a super-block.
GRIDS = {
    108: tuple(itertools.product((2, 3, 4, 8), (2, 4, 8), (32,), (16, 32, 64), (16, 64, 256))),
    243: tuple(itertools.product((2, 3, 4), (2, 3, 4), (16, 16.0, 32), (16, 32, 64), (16, 64, 256))),
}


def llama(layers: int, configs: int, bits: float, seed: int) -> Problem:
    """Matrices of a Llama model by quantiser configurations; costs in bytes, budget of ``bits`` a weight."""
    rng = np.random.default_rng(seed)
    grid = GRIDS[configs]
    names = ["-".join(str(part) for part in config) for config in grid]
    items, weights = [], 0
    for layer, (name, height, width) in itertools.product(range(layers), LLAMA_70B):
        size = height * width
        weights += size
        sensitivity = math.exp(rng.normal(0.0, 1.5)) / size**0.5
        choices = []
        for label, (b0, b1, b2, block, super_block) in zip(names, grid, strict=True):
            blocks = size // block
            cost = (size * b0 + blocks * b1 + blocks // super_block * int(b2)) // 8 + 4
            coarse = 1.2 * 4.0**-b0 * (1 + 0.12 * math.log2(block)) + 0.004 * 4.0**-b1 * super_block**0.25
            jitter = math.exp(rng.normal(0.0, 0.03))
            choices.append(Choice(label, cost, sensitivity * size * coarse * jitter))
        items.append(Item(f"{layer}.{name}", tuple(choices)))
    return Problem(int(bits * weights) // 8, tuple(items))


def experts(count: int, width: int, seed: int) -> Problem:
    """Expert matrices of one size with heavy-tailed sensitivities, ``width`` choices each."""
    rng = np.random.default_rng(seed)
    rate = np.linspace(2.0, 8.0, width)
    names = [f"c{c}" for c in range(width)]
    cost = (rate * 2048 * 768 / 8).astype(int)[None, :] + rng.integers(0, 4096, (count, width))
    loss = np.exp(rng.normal(0, 2, (count, 1)) + rng.normal(0, 0.1, (count, width))) * 4.0**-rate
    items = tuple(
        Item(f"e{i}", tuple(Choice(*entry) for entry in zip(names, row, lost, strict=True)))
        for i, (row, lost) in enumerate(zip(cost.tolist(), loss.tolist(), strict=True))
    )
    return Problem(int(3.0 * 2048 * 768 / 8) * count, items)


def plain_cbc(problem: Problem, gap: float, limit: int) -> None:
    """One binary per choice, an equality per item, one budget row: the model a reader would write first."""
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    dearest = max(choice.cost for item in problem.items for choice in item.choices)
    objective, row = [], []
    for i, item in enumerate(problem.items):
        binaries = [model.add_variable(f"x_{i}_{c}", cat="Binary") for c in range(len(item.choices))]
        model += pulp.lpSum(binaries) == 1
        for x, choice in zip(binaries, item.choices, strict=True):
            objective.append((x, choice.loss))
            row.append((x, choice.cost / dearest))
    model += pulp.LpAffineExpression(objective)
    model += pulp.LpAffineExpression(row) <= problem.budget / dearest
    bundled = pulp.PULP_CBC_CMD.pulp_cbc_path
    model.solve(pulp.COIN_CMD(msg=False, gapRel=gap, timeLimit=limit, threads=1, path=bundled))


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds and relative spread."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median


def versus(name: str, problem: Problem, exact: bool, bar: float, repeats: int, limit: int) -> Row:
    """Seconds of ours and of the plain model for the same claim."""
    solution: Solution = solve(problem, exact=exact)
    check(problem, solution)
    ours, spread = timed(lambda: solve(problem, exact=exact), max(repeats, 3))
    peer, _ = timed(lambda: plain_cbc(problem, 0.0 if exact else CERTIFIED_GAP, limit), repeats)
    reached = solution.optimal if exact else solution.gap <= CERTIFIED_GAP
    claim = "proved optimum" if exact else f"gap {solution.gap:.1e}"
    stopped = ", peer stopped" if peer >= limit else ""
    ratio = peer / ours
    holds = reached and ratio >= bar
    return Row(f"{name}, {claim}{stopped}, s", ours, peer, ratio, f">= {bar:g}x", holds, spread)


def alone(name: str, run: Callable[[], object], limit: float) -> Row:
    """Seconds of ours against a fixed limit."""
    ours, spread = timed(run, 3)
    return Row(f"{name}, s", ours, None, None, f"<= {limit:g} s", ours <= limit, spread)


def measure(short: bool) -> Iterator[Row]:
    """All rows; the short form keeps every measure but on small instances."""
    repeats = 1 if short else 3
    layers, limit = (32, PEER_LIMIT_SHORT) if short else (80, PEER_LIMIT)
    for configs in (108,) if short else (108, 243):
        for bits in (3.0,) if short else (2.5, 2.75, 3.0, 3.5):
            problem = llama(layers, configs, bits, seed=configs)
            name = f"{len(problem.items)} x {configs} at {bits:g} bits"
            yield versus(name, problem, False, 200, repeats, limit)
            yield versus(name, problem, True, 15, repeats, limit)
    problem = llama(layers, 108, 3.0, seed=1)
    yield alone(f"frontier of {len(problem.items)} x 108", lambda: frontier(problem), 1.0)
    many = experts(1_000 if short else 45_000, 50, seed=2)
    solution = solve(many)
    check(many, solution)
    state = "proved optimum" if solution.optimal else f"gap {solution.gap:.1e}"
    yield alone(f"{len(many.items)} x 50, {state}", lambda: solve(many), 60.0)


if __name__ == "__main__":
    rows.run("Time the allocation solver beside plain PuLP/CBC.", measure)

"""Error table and decomposition: time beside the published way, and what the estimate costs in true loss.

    python benchmarks/table.py [--short] [--json FILE] [--model smollm2|gemma3|stories260k] [--calibration N]

Matrices: those of the first, the middle and the last layer (--short: the middle one, at fewer configurations). Ours is
the estimated table of every configuration, the choice, and the decomposition of what was chosen. The peer evaluates
every configuration by LQ-LoRA's own loop (NF levels, Fisher weights, rounding to nearest, until the first increase, 100
iterations at most): the same bits, blocks and ranks, so the two tables have the same entries. Both read their moments
in the time that is measured.

The loss of the allocation from our table is a true one, each chosen configuration decomposed; its peer is the best
there is, the allocation from a table of nothing but true losses of our loop. q/k/v and gate/up are tied.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import rows
import torch
from perplexity import SUBJECTS, context, setting, settings
from rows import Row

from prune.groups import PRUNED_AXIS
from qlora_pipe.allocation import offered, pose
from qlora_pipe.compile import compile_model
from qlora_pipe.events import Reporter
from qlora_pipe.known import choices_for
from qlora_pipe.layouts import packed_bytes, packed_shape
from qlora_pipe.rules import narrow
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.score import seed_of
from quant.errors import error_table, full_table
from quant.storage import Choice
from solver import solve

BUDGETS = (2.5, 2.75, 3.0, 3.5)
TIMED_AT = 3.0
FASTER, WITHIN = 10, 1.01

Place = tuple[int, int, str, str]
"""Number in the model's order, layer, role and name of a matrix."""
Losses = dict[str, dict[Choice, float]]


class Matrices:
    """Some matrices of a model, and their tables."""

    def __init__(self, made: Context, short: bool) -> None:
        self.context, self.settings = made, made.config.decompose
        architecture = made.known.architecture
        count = len(architecture.layers)
        layers = {count // 2} if short else {0, count // 2, count - 1}
        every = enumerate(architecture.linears())
        self.places: list[Place] = [(number, *place) for number, place in every if place[0] in layers]
        self.choices = {
            name: choices_for(architecture, role, layer, made.config) for _, layer, role, name in self.places
        }
        self.bytes = {
            name: {c: packed_bytes(packed_shape(architecture, layer, role, c)) for c in self.choices[name]}
            for _, layer, role, name in self.places
        }
        self.weights = sum(made.base_reader.read_float(f"{name}.weight").numel() for *_, name in self.places)

    def estimated(self) -> Losses:
        """Our table."""
        moments, found = Moments(self.context), {}
        for number, layer, role, name in self.places:
            choices = self.choices[name]
            entries = error_table(
                self.context.base_reader.read_float(f"{name}.weight"),
                choices,
                generator=torch.Generator().manual_seed(seed_of(self.context, number)),
                metric=moments.metric(layer, role),
                passing=moments.passing(layer, role, choices),
                transposed=PRUNED_AXIS[role] == "columns",
                outputs=self.settings.table_outputs,
                max_iterations=self.settings.iterations,
                multiples=self.settings.multiples,
            )
            found[name] = {choice: entry.loss for choice, entry in zip(choices, entries, strict=True)}
        return found

    def decomposed(self, choices: Mapping[str, Sequence[Choice]], made: Context | None = None) -> Losses:
        """Losses of whole decompositions; with the context of other settings, by their loop."""
        made = made or self.context
        moments, found = Moments(made), {}
        for number, layer, role, name in self.places:
            losses = full_table(
                made.base_reader.read_float(f"{name}.weight"),
                choices[name],
                generator_seed=seed_of(made, number),
                metric=moments.metric(layer, role),
                passing=moments.passing(layer, role, choices[name]),
                transposed=PRUNED_AXIS[role] == "columns",
                max_iterations=made.config.decompose.iterations,
                patience=made.config.decompose.patience,
                multiples=made.config.decompose.multiples,
            )
            found[name] = dict(zip(choices[name], losses, strict=True))
        return found

    def chosen(self, losses: Losses, bits: float) -> dict[str, Choice]:
        """What the integer programme picks from a table."""
        table = {
            name: [c.to_json() | {"bytes": self.bytes[name][c], "loss": loss} for c, loss in entries.items()]
            for name, entries in losses.items()
        }
        narrowed = narrow(offered(table), (), self.settings.ties)
        selection = solve(pose(table, narrowed, int(bits * self.weights / 8))).selection
        return {name: next(c for c in losses[name] if c.name == choice) for name, choice in selection.items()}

    def published(self) -> dict[str, list[Choice]]:
        """The same configurations with NF levels."""
        return {name: [replace(c, grid="nf") for c in choices] for name, choices in self.choices.items()}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time, then the loss at each budget."""
    subject, short = SUBJECTS[arguments.model], arguments.short
    few = {"bits": [2, 3], "block_sizes": [32, 64], "ranks": list(subject.ranks or (0, 16))[:2]} if short else {}
    lq = {"method": "lq", "metric": "fisher", "rounding": "nearest", "scale_search": False, "iterations": 100}
    config = settings(subject, *setting("decompose", **few), sequences=arguments.calibration)
    published = config.model_copy(update={"decompose": config.decompose.model_copy(update=lq)})
    artifacts = compile_model(config, Reporter(), until="calibrate")
    made, theirs = context(config, artifacts), context(published, artifacts)
    matrices = Matrices(made, short)
    table: Losses = {}

    def ours() -> None:
        table.update(matrices.estimated())
        matrices.decomposed({name: [choice] for name, choice in matrices.chosen(table, TIMED_AT).items()})

    entries = sum(len(choices) for choices in matrices.choices.values())
    name = f"{subject.name}, {len(matrices.places)} matrices, {entries} entries"
    fast = seconds(ours)
    slow = seconds(lambda: matrices.decomposed(matrices.published(), theirs))
    measure = f"{name}: table + decomposition / published loop, s"
    yield Row(measure, fast, slow, slow / fast, f">= {FASTER}x", slow >= FASTER * fast, 0.0)
    true = matrices.decomposed(matrices.choices)
    for bits in BUDGETS[2:3] if short else BUDGETS:
        found, best = (
            math.fsum(true[name][choice] for name, choice in matrices.chosen(losses, bits).items())
            for losses in (table, true)
        )
        measure = f"{name}, {bits:g} bits: true loss, our table / full table"
        yield Row(measure, found, best, found / best, f"<= {WITHIN}", found <= WITHIN * best, 0.0)


if __name__ == "__main__":
    options = rows.parser("Error table and decomposition beside the published way.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration rows of 512 tokens")
    given = options.parse_args()
    rows.show(measure(given), given.json)

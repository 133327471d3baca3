"""score: the error table, what every configuration would cost in quality and in bytes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

from prune.groups import PRUNED_AXIS
from qlora_pipe import layouts
from qlora_pipe.errors import StageError
from qlora_pipe.hf import ranks
from qlora_pipe.known import choices_for
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.moments import Moments
from quant.errors import Estimate, error_table, full_table
from quant.exceptions import QuantError
from quant.storage import Choice

Matrix = tuple[int, tuple[int, str, str]]
"""Its number in the model, which seeds it, and (layer, role, name)."""

T = TypeVar("T")


def run(context: Context) -> None:
    """One matrix at a time, read from disk. Peak bytes: one matrix and a few temporaries of its size."""
    table: dict[str, list[dict[str, Any]]] = {}
    # Layers, as they come: matrices of one counted in a burst would say little of the time that is left.
    with context.reporter.progress("measuring errors", len(context.known.architecture.layers)) as advance:
        for layer, entries in enumerate(_entries(context)):
            table |= dict(entries)
            advance(f"layer {layer}")
    context.write_json("table.json", table)


Entry = tuple[str, list[dict[str, Any]]]
"""Name and rows of one matrix."""


def _entries(context: Context) -> Iterator[list[Entry]]:
    """Entries of every layer, in order."""
    return by_layer(context, partial(_rows, context, Moments(context)))


def by_layer(context: Context, function: Callable[[Matrix], T]) -> Iterator[list[T]]:
    """`function` of all matrices, a layer at a time, each layer on one of the processes: its matrices share inputs."""
    count = len(context.known.architecture.layers)
    matrices: list[Matrix] = list(enumerate(context.known.architecture.linears()))
    layers = [[matrix for matrix in matrices if matrix[1][0] == layer] for layer in range(count)]
    return ranks.share(lambda layer: [_named(function, matrix) for matrix in layer], layers)


def _named(function: Callable[[Matrix], T], matrix: Matrix) -> T:
    try:
        return function(matrix)
    except QuantError as error:
        raise StageError(f"{matrix[1][2]}: {error}") from error


def _rows(context: Context, moments: Moments, matrix: Matrix) -> Entry:
    architecture = context.known.architecture
    _, (layer, role, name) = matrix
    choices = choices_for(architecture, role, layer, context.config)
    sizes = [layouts.packed_bytes(layouts.packed_shape(architecture, layer, role, choice)) for choice in choices]
    estimates = _estimates(context, moments, matrix, choices)
    return name, [
        choice.to_json() | {"bytes": size, "loss": estimate.loss, "error": estimate.error}
        for choice, size, estimate in zip(choices, sizes, estimates, strict=True)
    ]


def _estimates(context: Context, moments: Moments, matrix: Matrix, choices: list[Choice]) -> list[Estimate]:
    number, (layer, role, name) = matrix
    settings, seed = context.config.decompose, seed_of(context, number)
    weight = context.base_reader.read_float(f"{name}.weight")
    metric, passing = moments.metric(layer, role), moments.passing(layer, role, choices)
    transposed = PRUNED_AXIS[role] == "columns"
    if settings.table == "full":
        losses = full_table(
            weight,
            choices,
            generator_seed=seed,
            metric=metric,
            passing=passing,
            transposed=transposed,
            max_iterations=settings.iterations,
            patience=settings.patience,
            quantize_first=settings.start == "quantize",
            multiples=settings.multiples,
        )
        return [Estimate(loss, 0.0) for loss in losses]
    return error_table(
        weight,
        choices,
        generator=torch.Generator().manual_seed(seed),
        metric=metric,
        passing=passing,
        transposed=transposed,
        outputs=settings.table_outputs,
        max_iterations=settings.iterations,
        patience=settings.patience,
        quantize_first=settings.start == "quantize",
        multiples=settings.multiples,
    )


def exhaust(results: Iterator[Any]) -> None:
    """What a process does whose results go to rank 0."""
    for _ in results:
        raise AssertionError("results are rank 0's alone")


def seed_of(context: Context, number: int) -> int:
    """The seed of one matrix."""
    return context.config.seed * 1_000_003 + number


STAGE = Stage(
    "score",
    5,
    ("source", "calibrate"),
    lambda config: {"seed": config.seed} | config.decompose.measured(),
    run,
    work=lambda context: exhaust(_entries(context)),
)

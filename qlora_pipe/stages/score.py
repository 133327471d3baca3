"""score: the error table, what every configuration would cost in quality and in bytes."""

import torch

from prune.groups import PRUNED_AXIS
from qlora_pipe import layouts
from qlora_pipe.known import choices_for
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.moments import Moments
from quant.errors import error_table, full_table
from quant.storage import Choice

SEARCH = ("budget", "ties", "rules", "time_limit")
"""Settings of the allocation, which no entry of the table depends on."""


def run(context: Context) -> None:
    """One matrix at a time, read from disk. Peak bytes: one matrix and a few temporaries of its size."""
    architecture, moments = context.known.architecture, Moments(context)
    table = {}
    with context.reporter.progress("measuring errors", len(context.known.allocation)) as advance:
        for number, (layer, role, name) in enumerate(architecture.linears()):
            choices = choices_for(architecture, role, layer, context.config)
            losses = _losses(context, moments, number, layer, role, name, choices)
            table[name] = [
                choice.to_json()
                | {"bytes": layouts.packed_bytes(layouts.packed_shape(architecture, layer, role, choice)), "loss": loss}
                for choice, loss in zip(choices, losses, strict=True)
            ]
            advance()
    context.write_json("table.json", table)


def _losses(
    context: Context, moments: Moments, number: int, layer: int, role: str, name: str, choices: list[Choice]
) -> list[float]:
    settings, seed = context.config.decompose, seed_of(context, number)
    weight = context.base_reader.read_float(f"{name}.weight")
    metric, passing = moments.metric(layer, role), moments.passing(layer, role, choices)
    transposed = PRUNED_AXIS[role] == "columns"
    if settings.table == "full":
        return full_table(
            weight,
            choices,
            generator_seed=seed,
            metric=metric,
            passing=passing,
            transposed=transposed,
            max_iterations=settings.iterations,
            patience=settings.patience,
            quantize_first=settings.start == "quantize",
        )
    return error_table(
        weight,
        choices,
        generator=torch.Generator().manual_seed(seed),
        metric=metric,
        passing=passing,
        transposed=transposed,
        outputs=settings.table_outputs,
    )


def seed_of(context: Context, number: int) -> int:
    """The seed of one matrix."""
    return context.config.seed * 1_000_003 + number


STAGE = Stage(
    "score",
    3,
    ("source", "calibrate"),
    lambda config: {"seed": config.seed} | config.decompose.model_dump(mode="json", exclude=set(SEARCH)),
    run,
)

"""score: the error table, what every configuration would cost in quality and in bytes."""

from collections.abc import Callable

from torch import Tensor

from prune.groups import PRUNED_AXIS
from qlora_pipe import layouts
from qlora_pipe.allocation import row_of
from qlora_pipe.known import choices_for
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.packing import block_format, stored, torch_dtype
from quant.errors import error_table


def run(context: Context) -> None:
    """One matrix at a time, read from disk. Peak bytes: one matrix and a few temporaries of its size."""
    config, architecture = context.config, context.known.architecture
    settings = config.decompose
    moments = context.reader("calibrate", "moments")
    table = {}
    with context.reporter.progress("measuring errors", len(context.known.allocation)) as advance:
        for number, (layer, role, name) in enumerate(architecture.linears()):
            choices = choices_for(architecture, role, layer, config)
            row_weight, column_weight = weights_of(context, moments.read, name, role)
            losses = error_table(
                stored(context.base_reader.read_float(f"{name}.weight"), role),
                [(block_format(choice, settings), choice.rank) for choice in choices],
                generator_seed=config.seed * 1_000_003 + number,
                row_weight=row_weight,
                column_weight=column_weight,
                iterations=settings.table_iterations,
                factor_dtype=torch_dtype(settings.factor_dtype),
            )
            table[name] = [
                row_of(choice)
                | {
                    "bytes": layouts.packed_bytes(layouts.packed_shape(architecture, layer, role, choice, settings)),
                    "loss": loss,
                }
                for choice, loss in zip(choices, losses, strict=True)
            ]
            advance()
    context.write_json("table.json", table)


def weights_of(
    context: Context, read: Callable[[str], Tensor], name: str, role: str
) -> tuple[Tensor | None, Tensor | None]:
    """Root Fisher weights of the rows and columns of the stored matrix, or none (LQ-LoRA, section 3.3)."""
    if context.config.decompose.metric == "none":
        return None, None
    rows, columns = read(f"{name}.gradient").sqrt(), read(f"{name}.input").sqrt()
    return (columns, rows) if PRUNED_AXIS[role] == "columns" else (rows, columns)


STAGE = Stage(
    "score",
    1,
    ("source", "calibrate"),
    lambda config: (
        {"seed": config.seed}
        | {
            key: value
            for key, value in config.decompose.model_dump(mode="json").items()
            if key not in ("budget", "ties", "rules", "iterations", "time_limit")
        }
    ),
    run,
)

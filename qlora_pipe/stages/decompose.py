"""decompose: W = Q + L1 L2 in the chosen configuration, matrix by matrix from disk to disk."""

import torch

from qlora_pipe import layouts
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.packing import block_format, packed_buffers, stored, torch_dtype
from qlora_pipe.stages.score import weights_of
from quant.decompose import decompose


def run(context: Context) -> None:
    """Peak bytes: one matrix in fp32 and a few temporaries of its size."""
    config, known = context.config, context.known
    settings, architecture = config.decompose, known.architecture
    moments = context.reader("calibrate", "moments")
    losses = {}
    with (
        context.writer(known.decomposed()) as writer,
        context.reporter.progress("decomposing", len(known.allocation)) as advance,
    ):
        for number, (layer, role, name) in enumerate(architecture.linears()):
            choice = known.allocation[name]
            shape = layouts.packed_shape(architecture, layer, role, choice, settings)
            row_weight, column_weight = weights_of(context, moments.read, name, role)
            result = decompose(
                stored(context.base_reader.read_float(f"{name}.weight"), role),
                block_format(choice, settings),
                choice.rank,
                generator=torch.Generator().manual_seed(config.seed * 1_000_003 + number),
                row_weight=row_weight,
                column_weight=column_weight,
                max_iterations=settings.iterations,
                factor_dtype=torch_dtype(settings.factor_dtype),
            )
            bias = context.base_reader.read_float(f"{name}.bias") if shape.bias else None
            for buffer, tensor in packed_buffers(result.quantized, result.left, result.right, shape, bias).items():
                writer.write(f"{name}.{buffer}", tensor)
            losses[name] = {"choice": choice.name, "loss": result.loss, "iterations": len(result.losses)}
            advance()
        for name in architecture.others():
            writer.write(name, context.base_reader.read(name))
    context.write_json("decomposition.json", losses)


STAGE = Stage(
    "decompose",
    1,
    ("source", "calibrate", "allocate"),
    lambda config: (
        {"seed": config.seed}
        | config.decompose.model_dump(mode="json", exclude={"budget", "ties", "rules", "time_limit"})
    ),
    run,
)

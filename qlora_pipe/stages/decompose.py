"""decompose: W = Q + L1 L2 in the chosen configuration, matrix by matrix from disk to disk."""

import torch

from qlora_pipe import layouts
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.score import SEARCH, seed_of
from quant.buffers import packed_buffers
from quant.decompose import decompose


def run(context: Context) -> None:
    """Peak bytes: one matrix in fp32 and a few temporaries of its size."""
    known, settings, moments = context.known, context.config.decompose, Moments(context)
    losses = {}
    with (
        context.writer(known.decomposed()) as writer,
        context.reporter.progress("decomposing", len(known.allocation)) as advance,
    ):
        for number, (layer, role, name) in enumerate(known.architecture.linears()):
            choice = known.allocation[name]
            shape = layouts.packed_shape(known.architecture, layer, role, choice)
            passing = moments.passing(layer, role, [choice])
            result = decompose(
                context.base_reader.read_float(f"{name}.weight"),
                choice,
                generator=torch.Generator().manual_seed(seed_of(context, number)),
                metric=moments.metric(layer, role),
                passing=None if passing is None else passing[None if shape.transposed else choice.block_size],
                transposed=shape.transposed,
                max_iterations=settings.iterations,
                patience=settings.patience,
                quantize_first=settings.start == "quantize",
            )
            bias = context.base_reader.read_float(f"{name}.bias") if shape.bias else None
            factors = (result.left, result.right, result.factor_scale)
            for buffer, tensor in packed_buffers(result.quantized, factors, shape, bias).items():
                writer.write(f"{name}.{buffer}", tensor)
            losses[name] = {"choice": choice.name, "loss": result.loss, "iterations": len(result.losses)}
            advance()
        for name in known.architecture.others():
            writer.write(name, context.base_reader.read(name))
    context.write_json("decomposition.json", losses)


STAGE = Stage(
    "decompose",
    3,
    ("source", "calibrate", "allocate"),
    lambda config: {"seed": config.seed} | config.decompose.model_dump(mode="json", exclude=set(SEARCH)),
    run,
)

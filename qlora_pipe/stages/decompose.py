"""decompose: W = Q + L1 L2 in the chosen configuration, matrix by matrix from disk to disk."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_pipe import layouts
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.score import SEARCH, Matrix, by_layer, exhaust, seed_of
from quant.buffers import packed_buffers
from quant.decompose import decompose


def run(context: Context) -> None:
    """Peak bytes: one matrix in fp32, a few temporaries of its size, and the packed maps of one layer."""
    known = context.known
    losses = {}
    with (
        context.writer(known.decomposed()) as writer,
        context.reporter.progress("decomposing", len(known.allocation)) as advance,
    ):
        for layer in _decomposed(context):
            for name, buffers, facts in layer:
                for buffer, tensor in buffers.items():
                    writer.write(f"{name}.{buffer}", tensor)
                losses[name] = facts
                advance()
        for name in known.architecture.others():
            writer.write(name, context.base_reader.read(name))
    context.write_json("decomposition.json", losses)


Decomposed = tuple[str, dict[str, Tensor], dict[str, Any]]
"""Name, buffers and figures of one matrix."""


def _decomposed(context: Context) -> Iterator[list[Decomposed]]:
    return by_layer(context, partial(_one, context, Moments(context)))


def _one(context: Context, moments: Moments, matrix: Matrix) -> Decomposed:
    known, settings = context.known, context.config.decompose
    number, (layer, role, name) = matrix
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
    )
    bias = context.base_reader.read_float(f"{name}.bias") if shape.bias else None
    buffers = packed_buffers(result.quantized, (result.left, result.right, result.factor_scale), shape, bias)
    return name, buffers, {"choice": choice.name, "loss": result.loss, "iterations": len(result.losses)}


STAGE = Stage(
    "decompose",
    3,
    ("source", "calibrate", "allocate"),
    lambda config: {"seed": config.seed} | config.decompose.model_dump(mode="json", exclude=set(SEARCH)),
    run,
    work=lambda context: exhaust(_decomposed(context)),
)

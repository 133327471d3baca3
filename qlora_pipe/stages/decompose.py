"""decompose: W = Q + L1 L2 in the chosen configuration, matrix by matrix from disk to disk.

The artifact is a Hugging Face folder: transformers loads it as it stands once qlora_pipe is imported.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlora_pipe import layouts
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.packing import write_packed_model
from qlora_pipe.stages.score import Matrix, by_layer, exhaust, seed_of
from quant.buffers import packed_buffers
from quant.decompose import decompose
from quant.rounding import passing_for


def run(context: Context) -> None:
    """Peak bytes: one matrix in fp32, a few temporaries of its size, and the packed maps of one layer; or as
    `write_packed_model`, if that is more."""
    figures: dict[str, dict[str, Any]] = {}
    write_packed_model(context, _maps(context, figures))
    context.write_json("decomposition.json", figures)


def _maps(context: Context, figures: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and buffers of every matrix, in order; its figures go to `figures`."""
    with context.reporter.progress("decomposing", len(context.known.architecture.layers)) as advance:
        for layer, matrices in enumerate(_decomposed(context)):
            for name, buffers, found in matrices:
                figures[name] = found
                yield name, buffers
            advance(f"layer {layer}")


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
        passing=passing_for(choice, passing, shape.transposed),
        transposed=shape.transposed,
        max_iterations=settings.iterations,
        patience=settings.patience,
        quantize_first=settings.start == "quantize",
        multiples=settings.multiples,
    )
    bias = context.base_reader.read_float(f"{name}.bias") if shape.bias else None
    buffers = packed_buffers(result.quantized, (result.left, result.right, result.factor_scale), shape, bias)
    return name, buffers, {"choice": choice.name, "loss": result.loss, "iterations": len(result.losses)}


STAGE = Stage(
    "decompose",
    4,
    ("source", "calibrate", "allocate"),
    lambda config: {"seed": config.seed} | config.decompose.measured() | config.decompose.tables(),
    run,
    work=lambda context: exhaust(_decomposed(context)),
)

"""refine: scales, levels and low-rank factors of the full decomposed model, tuned to the original; codes stay."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from qlora_pipe.architectures import MODULE, linear_name
from qlora_pipe.config import Config
from qlora_pipe.hf import ranks
from qlora_pipe.hf.blocks import tune_blocks
from qlora_pipe.hf.calibration import batches_of
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.stages.base import Context, Stage, alike, computing
from qlora_pipe.stages.calibrate import calibration_rows
from qlora_pipe.stages.models import base_layers, base_model, tunable_layers, tunable_model
from qlora_pipe.stages.packing import read_buffers, write_packed_model
from qlora_pipe.stages.train import fit, training_rows
from quant.tunable import TunableLinear

Read = Callable[[str], Tensor]


def run(context: Context) -> None:
    """On calibration text: block by block (ApiQ, arXiv 2402.05147), then end to end (RILQ, arXiv 2412.01129).

    Peak bytes: of the first part two layers, one of each model, their activations, and the packed model that comes out;
    of the second the original model, the packed one, four fp32 copies of what is tuned, and one batch's activations.
    """
    settings = context.config.refine
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "refine.enabled is false"})
        return
    history: dict[str, list[dict[str, float]]] = {}
    read: Read = context.reader("decompose").read
    if settings.block_rows:
        history["blocks"], found = ranks.agree(partial(_by_blocks, context))
        read = found.__getitem__
    if settings.steps:
        history["steps"], read = _end_to_end(context, read)
    known = context.known
    places = (
        (name, known.packed_shape("decompose", layer, role)) for layer, role, name in known.architecture.linears()
    )
    write_packed_model(context, ((name, read_buffers(read, name, shape)) for name, shape in places))
    context.write_json("history.json", history)


def _by_blocks(context: Context) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    settings, found = context.config.refine, dict[str, Tensor]()
    tokens = calibration_rows(context, settings.length, settings.block_rows)

    def take(index: int, layer: nn.Module) -> None:
        for role, module in MODULE.items():
            found.update(_tuned(layer, module, linear_name(index, role)))

    log = tune_blocks(
        base_layers(context),
        tunable_layers(context),
        batches_of(tokens, context.config.device, settings.batch_size * settings.length),
        settings,
        take,
        section="refine",
        folder=context.work,
        seed=context.config.seed,
        reporter=context.reporter,
    )
    return log, found


def _end_to_end(context: Context, read: Read) -> tuple[list[dict[str, float]], Read]:
    settings, found = context.config.refine, dict[str, Tensor]()
    model, teacher = tunable_model(context, read), base_model(context)
    chosen = training_rows(context, context.config.data.calibration, settings)
    log = fit(context, model, chosen, settings, loss=partial(summed_divergence, teacher))
    for _, _, name in context.known.architecture.linears():
        found.update(_tuned(model, name, name))
    return log, found.__getitem__


def _tuned(model: nn.Module, module: str, name: str) -> dict[str, Tensor]:
    """Every stored tensor of a tuned map, by its name in the whole model."""
    linear = model.get_submodule(module)
    assert isinstance(linear, TunableLinear)
    return {f"{name}.{buffer}": tensor for buffer, tensor in linear.packed().items()}


def _settings(config: Config) -> dict[str, Any]:
    if not config.refine.enabled:
        return {"enabled": False}
    return computing(config) | config.refine.decisive()


STAGE = Stage(
    "refine",
    2,
    ("source", "allocate", "decompose"),
    _settings,
    run,
    lambda config: {"calibration": config.data.calibration} if config.refine.enabled else {},
    work=alike(run),
)

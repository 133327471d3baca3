"""compact: L4Q on the pruned original weights; the integers of the last step are what is written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prune.groups import PRUNED_AXIS
from qlora_pipe.architectures import place_of
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config import Config
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import Make, compensation, l4q_modules, sliced_base_model
from qlora_pipe.stages.packing import read_factors, write_factors
from qlora_pipe.stages.train import fit, strength, training_rows
from quant.fakequant import L4QLinear
from quant.grid import to_unsigned
from quant.pack import pack


def run(context: Context) -> None:
    """Peak bytes: the small model in the compute dtype, factors and steps with optimiser state, one batch."""
    settings = context.config.compact
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "compact.enabled is false"})
        return
    model = sliced_base_model(context, _l4q_maker(context))
    modules = l4q_modules(model)
    for module in modules.values():
        for parameter in (module.lora_a, module.lora_b, module.scale, module.offset):
            if parameter is not None:
                parameter.requires_grad_()
    chosen = training_rows(context, context.config.data.task, settings)
    log = fit(context, model, chosen, settings, settings.step_rate)
    _write(context, modules)
    context.write_json("history.json", log)


def compact_strength(context: Context) -> float:
    """What multiplies B A in the L4Q layers: that of slot T if they start from it."""
    settings = context.config.compact
    return strength(context) if settings.warm_start else settings.alpha / settings.rank


def _l4q_maker(context: Context) -> Make:
    """(name, weight, bias) to an L4Q layer; with a warm start its factors begin as slots C and T side by side."""
    settings, bits = context.config.compact, context.known.integer_bits
    generator = torch.Generator().manual_seed(context.config.seed)
    adapter = context.reader("train", "adapter")
    importance = input_squares(context)

    def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        start = _warm_start(context, adapter, name) if settings.warm_start else None
        return L4QLinear(
            weight,
            bias,
            bits=bits[name],
            group_size=settings.group_size,
            rank=settings.rank,
            alpha=compact_strength(context),
            generator=generator,
            offset=settings.offset_at(bits[name]),
            init=settings.init,
            importance=importance(name),
            warm_start=start,
        )

    return make


def input_squares(context: Context) -> Callable[[str], Tensor | None]:
    """Name of a linear map to the mean squares of the inputs that pruning leaves it, [in]; None where the first steps
    do not ask for them."""
    if context.config.compact.init != "awmse":
        return lambda name: None
    moments = context.reader("calibrate", "moments")

    def squares(name: str) -> Tensor:
        layer, role = place_of(name)
        found = moments.read(f"{name}.input")
        return found[context.index_map.kept_indices(layer, role)] if PRUNED_AXIS[role] == "columns" else found

    return squares


def _warm_start(context: Context, adapter: TensorReader, name: str) -> tuple[Tensor, Tensor]:
    """Factors of which `compact_strength` times B A is what slots C and T add to the weight."""
    lora_a, lora_b = read_factors(adapter.read, name)
    if not context.config.compensates:
        return lora_a, lora_b
    slot_a, slot_b = compensation(context, name)
    return torch.cat([slot_a, lora_a]), torch.cat([slot_b / strength(context), lora_b], dim=1)


def _write(context: Context, modules: dict[str, L4QLinear]) -> None:
    known = context.known
    with context.writer(known.integers()) as writer:
        for name, module in modules.items():
            codes, scale, offset = module.quantized()
            writer.write(f"{name}.codes", pack(to_unsigned(codes, module.bits), module.bits))
            writer.write(f"{name}.scale", scale)
            if module.offset is not None and offset is not None:
                writer.write(f"{name}.offset", offset)
            if module.bias is not None:
                writer.write(f"{name}.bias", module.bias.float())
        for name in known.small.others():
            writer.write(name, context.base_reader.read(name))
    with context.writer(known.compact_adapter(), stem="adapter") as writer:
        for name, module in modules.items():
            write_factors(writer, name, module.lora_a, module.lora_b)


def compact_settings(config: Config) -> dict[str, Any]:
    """What the integer model depends on."""
    if not config.compact.enabled:
        return {"enabled": False}
    return computing(config) | config.compact.model_dump(mode="json", exclude={"save_steps"})


STAGE = Stage(
    "compact",
    3,
    ("source", "calibrate", "select", "prune", "align", "train"),
    compact_settings,
    run,
    lambda config: {"task": config.data.task},
)

"""compact: L4Q on the pruned original weights; the integers of the last step are what is written."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.architectures import MODULE, linear_name, place_of
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config import Config
from qlora_pipe.config_data import Dataset
from qlora_pipe.hf import ranks
from qlora_pipe.hf.blocks import tune_blocks
from qlora_pipe.hf.calibration import batches_of
from qlora_pipe.hf.model import dense_linear
from qlora_pipe.hf.training import trained_parameters
from qlora_pipe.stages.base import Context, Stage, alike, computing
from qlora_pipe.stages.calibrate import calibration_rows
from qlora_pipe.stages.models import (
    Make,
    compensation,
    l4q_modules,
    merged_weight,
    sliced_base_layers,
    sliced_base_model,
)
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.packing import read_factors, write_factors
from qlora_pipe.stages.train import fit, objective, strength, task_rows
from quant.fakequant import L4QLinear
from quant.grid import to_unsigned
from quant.linear import PackedMatrix
from quant.pack import pack
from quant.start import first_codes, into_cells, packed_into_cells


def run(context: Context) -> None:
    """Block by block (EfficientQAT, arXiv 2407.11062) if `block_rows` says so, then end to end.

    Peak bytes: of the first part two layers, one of them dense, their activations, and all factors and steps; of the
    second the small model in the compute dtype, its linear maps packed if `base` says so, factors and steps with
    optimiser state, one batch, and what `objective` takes. While maps are made one matrix's temporaries and what
    `Moments` holds."""
    settings = context.config.compact
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "compact.enabled is false"})
        return
    tuned: dict[str, dict[str, Tensor]] = {}
    if settings.block_rows:
        blocks, tuned = ranks.agree(partial(_by_blocks, context))
        context.write_json("blocks.json", blocks)
    chosen = task_rows(context, settings) if settings.steps else []
    loss = objective(context, chosen, settings)
    model = sliced_base_model(context, _l4q_maker(context))
    modules = l4q_modules(model)
    for name, module in modules.items():
        module.load_state_dict(tuned.pop(name, {}), strict=False)
        module.tune()
    log = fit(context, model, chosen, settings, settings.step_rate, loss) if settings.steps else []
    _write(context, modules)
    context.write_json("history.json", log)


def _by_blocks(context: Context) -> tuple[list[dict[str, float]], dict[str, dict[str, Tensor]]]:
    """The log, and by name of the map its factors, steps and trained offsets."""
    settings, found = context.config.compact, dict[str, dict[str, Tensor]]()
    tokens = calibration_rows(context, settings.length, settings.block_rows)

    def take(index: int, layer: nn.Module) -> None:
        for role, module in MODULE.items():
            trained = trained_parameters(layer.get_submodule(module))
            found[linear_name(index, role)] = {name: tensor.cpu() for name, tensor in trained.items()}

    log = tune_blocks(
        sliced_base_layers(context, _target_maker(context)),
        sliced_base_layers(context, _l4q_maker(context)),
        batches_of(tokens, context.config.device, settings.batch_size * settings.length),
        settings,
        take,
        section="compact",
        folder=context.work,
        seed=context.config.seed,
        reporter=context.reporter,
        step_rate=settings.block_step_rate,
    )
    return log, found


def compact_strength(context: Context) -> float:
    """What multiplies B A in the L4Q layers: that of slot T if they start from it."""
    settings = context.config.compact
    return strength(context) if settings.warm_start else settings.alpha / settings.rank


def _l4q_maker(context: Context) -> Make:
    """(name, weight, bias) to an L4Q layer; with a warm start its factors begin as slots C and T side by side."""
    settings, strength = context.config.compact, compact_strength(context)
    generator = torch.Generator().manual_seed(context.config.seed)
    first_target, first = _first_target(context), first_integers(context)

    def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        bits = context.known.integer_bits[name]
        kind = settings.offset_at(bits)
        target, start = first_target(name, weight)
        codes, scale, offset = first(name, target)
        frozen: Tensor | PackedMatrix = weight
        if settings.packed_bits is not None:
            factors = None if start is None else (start[1] * -strength, start[0])
            frozen = packed_into_cells(
                *(target, codes, scale),
                bits=bits,
                half=kind == "half",
                packed_bits=settings.packed_bits,
                factors=factors,
            )
        elif context.config.compact_init(bits) == "feedback":
            inside = into_cells(target, codes, scale, bits=bits, half=kind == "half", dtype=weight.dtype)
            frozen = inside if start is None else merged_weight(inside, *start, -strength)
        return L4QLinear(
            frozen.to(weight.dtype) if isinstance(frozen, Tensor) else frozen,
            bias,
            bits=bits,
            group_size=settings.group_size,
            rank=settings.rank,
            alpha=strength,
            generator=generator,
            offset=kind,
            steps=(scale, offset),
            warm_start=start,
        )

    return make


def _target_maker(context: Context) -> Make:
    """(name, weight, bias) to a dense map of what its L4Q layer quantises first."""
    first_target = _first_target(context)
    return lambda name, weight, bias: dense_linear(first_target(name, weight)[0].to(weight.dtype), bias)


def _first_target(context: Context) -> Callable[[str, Tensor], tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """(name, weight) to what is quantised first, fp32 [out, in]: with a warm start slots C and T are part of it, and
    the factors that add them are there too."""
    adapter, strength = context.reader("train", "adapter"), compact_strength(context)

    def target(name: str, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        if not context.config.compact.warm_start:
            return weight.float(), None
        start = _warm_start(context, adapter, name)
        return merged_weight(weight, *start, strength), start

    return target


def first_integers(context: Context) -> Callable[[str, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """(name, fp32 weight) to the codes, steps and trained offsets that a linear map of the small model starts from."""
    settings = context.config.compact
    moments = Moments(context, pruned=True)

    def first(name: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        place, bits = place_of(name), context.known.integer_bits[name]
        method = context.config.compact_init(bits)
        return first_codes(
            weight,
            bits,
            settings.group_size,
            method=method,
            offset=settings.offset_at(bits),
            importance=moments.squares(*place) if method == "awmse" else None,
            passing=moments.feedback(*place, settings.group_size) if method == "feedback" else None,
        )

    return first


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
    found = computing(config) | config.compact.decisive()
    return found | {"damping": config.decompose.damping}


def _data(config: Config) -> dict[str, Dataset]:
    found = {"task": config.data.task}
    blocks = config.compact.enabled and config.compact.block_rows > 0
    return found | {"calibration": config.data.calibration} if blocks else found


STAGE = Stage(
    "compact",
    4,
    ("source", "calibrate", "select", "prune", "align", "train"),
    compact_settings,
    run,
    _data,
    work=alike(run),
)

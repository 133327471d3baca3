"""compact: L4Q, or a method it is measured beside, on the pruned original weights; the integers of the last step are
what is written."""

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
from qlora_pipe.hf.model import Model, dense_linear
from qlora_pipe.hf.training import trained_parameters
from qlora_pipe.stages.base import Context, Stage, alike, computing
from qlora_pipe.stages.calibrate import calibration_rows
from qlora_pipe.stages.models import (
    Make,
    compensation,
    integer_model,
    integer_modules,
    merged_weight,
    sliced_base_layers,
    sliced_base_model,
    with_adapter,
)
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.packing import read_factors, write_factors
from qlora_pipe.stages.train import fit, objective, strength, task_rows
from quant.baselines import FakeQuantLinear, LoRALinear, QALoRALinear
from quant.fakequant import L4QLinear
from quant.grid import offset_of, to_unsigned
from quant.linear import PackedMatrix
from quant.pack import pack
from quant.start import first_codes, into_cells, packed_into_cells


def run(context: Context) -> None:
    """Block by block (EfficientQAT, arXiv 2407.11062) if `block_rows` says so, then end to end.

    Peak bytes: of the first part two layers, one of them dense, their activations, and all factors and steps; of the
    second the small model in the compute dtype, its linear maps packed if `base` says so, what is trained with
    optimiser state, one batch, and what `objective` takes; with lsq the linear maps are what is trained. While maps are
    made one matrix's temporaries and what `Moments` holds."""
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
    model = sliced_base_model(context, _maker(context))
    while tuned:
        name, state = tuned.popitem()
        model.get_submodule(name).load_state_dict(state, strict=False)
    for _, _, name in context.known.small.linears():
        module = model.get_submodule(name)
        assert isinstance(module, L4QLinear | LoRALinear | QALoRALinear)
        module.tune()
    log = fit(context, model, chosen, settings, settings.step_rate, loss) if chosen else []
    _write(context, model)
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
        sliced_base_layers(context, _maker(context)),
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
    """What multiplies B A: that of slot T where factors go on from it."""
    settings = context.config.compact
    return strength(context) if settings.goes_on else settings.alpha / settings.rank


def compact_model(context: Context) -> Model:
    """What was trained, from what is stored of it, made dense. Peak bytes: the small dense model."""
    wrap = None
    if context.config.compact.method == "qat-lora":
        wrap = with_adapter(context.reader("compact", "adapter").read, compact_strength(context), context.dtype)
    return integer_model(context, context.reader("compact"), wrap)


def _maker(context: Context) -> Make:
    """(name, weight, bias) to a layer of the method. With a warm start slots C and T, side by side, are where its
    factors begin, or part of what is rounded."""
    settings, generator = context.config.compact, torch.Generator().manual_seed(context.config.seed)
    first_target, first = _first_target(context), first_integers(context)

    def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        bits = context.known.integer_bits[name]
        kind = settings.first_offset_at(bits)
        target, start = first_target(name, weight)
        codes, scale, offset = first(name, target)
        if settings.method == "qa-lora":
            return QALoRALinear(
                *(codes, scale, offset_of(kind, scale, offset), bias),
                bits=bits,
                rank=settings.rank,
                alpha=compact_strength(context),
                generator=generator,
            )
        factors = start if settings.method == "l4q" else None
        base = _under_rounding(context, name, weight, target, (codes, scale), factors)
        size, steps = settings.group_size, (scale, offset)
        if settings.method == "l4q":
            return L4QLinear(
                base,
                bias,
                bits=bits,
                group_size=size,
                rank=settings.rank,
                alpha=compact_strength(context),
                generator=generator,
                offset=kind,
                steps=steps,
                warm_start=factors,
                fused=settings.fused,
            )
        rounded = FakeQuantLinear(base, bias, bits=bits, group_size=size, steps=steps, offset=kind)
        if settings.method == "lsq":
            return rounded
        module = LoRALinear(rounded)
        if start is None:
            module.attach_adapter(settings.rank, settings.alpha, generator)
        else:
            module.set_adapter(*start, compact_strength(context))
        return module

    return make


def _under_rounding(
    context: Context,
    name: str,
    weight: Tensor,
    target: Tensor,
    integers: tuple[Tensor, Tensor],
    factors: tuple[Tensor, Tensor] | None,
) -> Tensor | PackedMatrix:
    """The matrix to which a layer adds its `factors`, if it has any, before rounding: together they round to the first
    codes of `target`."""
    settings, bits, strength = context.config.compact, context.known.integer_bits[name], compact_strength(context)
    # What lsq trains is a master that a step of bfloat16 would not move.
    dtype = torch.float32 if settings.method == "lsq" else weight.dtype
    half = settings.first_offset_at(bits) == "half"
    if settings.packed_bits is not None:
        removed = None if factors is None else (factors[1] * -strength, factors[0])
        return packed_into_cells(
            target, *integers, bits=bits, half=half, packed_bits=settings.packed_bits, factors=removed
        )
    if context.config.compact_init(bits) == "feedback":
        inside = into_cells(target, *integers, bits=bits, half=half, dtype=dtype)
        return (inside if factors is None else merged_weight(inside, *factors, -strength)).to(dtype)
    return (target if factors is None else weight).to(dtype)


def _target_maker(context: Context) -> Make:
    """(name, weight, bias) to a dense map of what its L4Q layer quantises first."""
    first_target = _first_target(context)
    return lambda name, weight, bias: dense_linear(first_target(name, weight)[0].to(weight.dtype), bias)


def _first_target(context: Context) -> Callable[[str, Tensor], tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """(name, weight) to what is quantised first, fp32 [out, in]: with a warm start slots C and T are part of it, but in
    qat-lora, and the factors that add them are there too."""
    adapter, settings = context.reader("train", "adapter"), context.config.compact

    def target(name: str, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        start = _warm_start(context, adapter, name) if settings.warm_start else None
        if start is None or settings.method == "qat-lora":
            return weight.float(), start
        return merged_weight(weight, *start, strength(context)), start

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
            offset=settings.first_offset_at(bits),
            importance=moments.squares(*place) if method == "awmse" else None,
            passing=moments.feedback(*place, settings.group_size) if method == "feedback" else None,
        )

    return first


def _warm_start(context: Context, adapter: TensorReader, name: str) -> tuple[Tensor, Tensor]:
    """Factors of which slot T's strength times B A is what slots C and T add to the weight."""
    lora_a, lora_b = read_factors(adapter.read, name)
    if not context.config.compensates:
        return lora_a, lora_b
    slot_a, slot_b = compensation(context, name)
    return torch.cat([slot_a, lora_a]), torch.cat([slot_b / strength(context), lora_b], dim=1)


def _write(context: Context, model: Model) -> None:
    known, modules = context.known, integer_modules(model)
    with context.writer(known.integers()) as writer:
        for name, module in modules.items():
            codes, scale, offset = module.quantized()
            writer.write(f"{name}.codes", pack(to_unsigned(codes, module.bits), module.bits))
            writer.write(f"{name}.scale", scale)
            if context.config.compact.trains_offsets and offset is not None:
                writer.write(f"{name}.offset", offset)
            if module.bias is not None:
                writer.write(f"{name}.bias", module.bias.float())
        for name in known.small.others():
            writer.write(name, context.base_reader.read(name))
    if not context.config.compact.leaves_adapter:
        return
    with context.writer(known.compact_adapter(), stem="adapter") as writer:
        for name, module in modules.items():
            place = model.get_submodule(name)
            beside = isinstance(place, LoRALinear)
            lora_a, lora_b = (place.task_a, place.task_b) if beside else (module.lora_a, module.lora_b)
            assert lora_a is not None
            assert lora_b is not None
            write_factors(writer, name, lora_a, lora_b)


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

"""The models of the chain, each built layer by layer from the artifacts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prune.groups import PRUNED_AXIS
from prune.slice import slice_bias, slice_rows_or_columns
from qlora_pipe.architectures import HEAD, Architecture, linear_name
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.model import AdaptedLinear, LinearOf, Model, TensorOf, build, dense_linear, load_config
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.packing import read_buffers, read_factors, read_packed, read_table
from quant.baselines import LoRALinear, QALoRALinear
from quant.fakequant import L4QLinear
from quant.grid import dequantize, offset_of, to_signed
from quant.linear import PackedLinear
from quant.pack import unpack
from quant.storage import PackedShape
from quant.tunable import TunableLinear

Wrap = Callable[[int, str, str, nn.Module], nn.Module]
"""(layer, role, name, linear map) to what takes its place."""

Make = Callable[[str, Tensor, Tensor | None], nn.Module]
"""(name, weight, bias) to a linear map."""


def base_model(context: Context, wrap: Wrap | None = None) -> Model:
    """The original model, dense. Peak bytes: its weights in the compute dtype."""
    return _build(context, context.known.architecture, _base_linear(context), context.base_reader, wrap)


def base_layers(context: Context) -> LayerStream:
    """The original model, dense, a layer at a time. Peak bytes: embedding, head and one layer."""
    return _layers(context, context.known.architecture, _base_linear(context), context.base_reader)


def decomposed_model(context: Context, wrap: Wrap | None = None) -> Model:
    """The full model with weights Q + L1 L2, made dense layer by layer. Peak bytes: the dense model."""
    return _from_packed(context, context.known.full_packed, context.known.architecture, wrap, dense=True)


def full_packed_model(context: Context) -> Model:
    """The full model with weights Q + L1 L2, packed. Peak bytes: the packed model."""
    return _from_packed(context, context.known.full_packed, context.known.architecture, None, dense=False)


def tunable_model(context: Context, read: Callable[[str], Tensor]) -> Model:
    """The full model with weights Q + L1 L2, whose buffers `read` gives by name, and whose scales, levels and factors
    can be tuned. Peak bytes: the packed model with fp32 scales and factors, and their changes."""
    reader, known = context.reader("decompose"), context.known
    model = _build(context, known.architecture, _tunable_linear(context, read), reader, None)
    for module in model.modules():
        if isinstance(module, TunableLinear):
            module.tune()
    return model


def tunable_layers(context: Context) -> LayerStream:
    """The decomposed model as `tunable_model`, a layer at a time. Peak bytes: embedding, head and one layer."""
    reader = context.reader("decompose")
    return _layers(context, context.known.architecture, _tunable_linear(context, reader.read), reader)


def pruned_model(context: Context, wrap: Wrap | None = None, *, dense: bool = True) -> Model:
    """The small model with weights Q + L1 L2. Peak bytes: the small model, dense or packed."""
    return _from_packed(context, "prune", context.known.small, wrap, dense=dense)


def aligned_model(context: Context, wrap: Wrap | None = None, *, dense: bool = True) -> Model:
    """The same with slot C, frozen, if it was trained: what the task's adapter is trained on."""
    if not context.config.compensates:
        return pruned_model(context, wrap, dense=dense)
    return _from_packed(context, "prune", context.known.small, wrap, dense=dense, slot=partial(compensation, context))


def task_model(context: Context, wrap: Wrap | None = None, *, dense: bool = True) -> Model:
    """What the task's adapter is trained on, slot C included: Q + L1 L2, packed or made dense, or the original weights.
    Not `dense`, it takes an adapter. Peak bytes: the small model, dense or packed."""
    if context.config.train.base == "packed":
        return aligned_model(context, wrap, dense=dense)

    def make(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        linear = dense_linear(compensated_weight(context, name, weight), bias)
        return linear if dense else LoRALinear(linear)

    return sliced_base_model(context, make, wrap)


def compensated_weight(context: Context, name: str, weight: Tensor) -> Tensor:
    """A weight of the small model and slot C, if it was trained, in the weight's dtype."""
    if not context.config.compensates:
        return weight
    return merged_weight(weight, *compensation(context, name), 1.0).to(weight.dtype)


def compensation(context: Context, name: str) -> tuple[Tensor, Tensor]:
    """Slot C of one linear map, fp32 A [rank, in] and B [out, rank], its scaling in B."""
    settings = context.config.align
    lora_a, lora_b = read_factors(context.reader("align", "adapter").read, name)
    return lora_a, lora_b * (settings.alpha / settings.rank)


def integer_model(context: Context, reader: TensorReader, wrap: Wrap | None = None) -> Model:
    """The trained integer model from what is stored of it, made dense. Peak bytes: the small dense model."""
    small = context.known.small

    def linear(layer: int, role: str, name: str) -> nn.Module:
        bias = reader.read_float(f"{name}.bias", context.dtype) if role in small.biased else None
        return dense_linear(integer_weight(context, reader, name).to(context.dtype), bias)

    return _build(context, small, linear, reader, wrap)


def integer_weight(context: Context, reader: TensorReader, name: str) -> Tensor:
    """fp32 weight [out, in] of a stored integer map: codes times steps and offset, the function that training used."""
    settings, bits = context.config.compact, context.known.integer_bits[name]
    scale, kind = reader.read(f"{name}.scale"), settings.offset_at(bits)
    codes = unpack(reader.read(f"{name}.codes"), bits, scale.shape[1] * settings.group_size)
    trained = reader.read(f"{name}.offset") if kind == "trained" else None
    return dequantize(to_signed(codes, bits), scale, offset_of(kind, scale, trained))


def sliced_base_model(context: Context, make: Make, wrap: Wrap | None = None) -> Model:
    """The original weights with pruned groups cut out; `make` turns (name, weight, bias) into a module.

    Peak bytes: the small model in the compute dtype, and one full matrix.
    """
    return _build(context, context.known.small, _sliced_linear(context, make), context.base_reader, wrap)


def sliced_base_layers(context: Context, make: Make) -> LayerStream:
    """The same a layer at a time. Peak bytes: embedding, head, one layer, and one full matrix."""
    return _layers(context, context.known.small, _sliced_linear(context, make), context.base_reader)


def sliced_base_weight(context: Context, layer: int, role: str, name: str) -> tuple[Tensor, Tensor | None]:
    """W0[I, J] and the bias it has in the small model, in the compute dtype."""
    reader, kept = context.base_reader, context.index_map.kept_indices(layer, role)
    weight = slice_rows_or_columns(reader.read_float(f"{name}.weight", context.dtype), role, kept)
    if role not in context.known.small.biased:
        return weight, None
    if PRUNED_AXIS[role] == "columns":
        # What went may have left its mean there.
        return weight, context.reader("prune").read_float(f"{name}.bias", context.dtype)
    return weight, slice_bias(reader.read_float(f"{name}.bias", context.dtype), role, kept)


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, strength: float) -> Tensor:
    """W0 + strength B A, fp32 [out, in]."""
    return torch.addmm(weight.float(), lora_b, lora_a, alpha=strength)


def with_adapter(read: Callable[[str], Tensor], strength: float, dtype: torch.dtype) -> Wrap:
    """A wrap that adds stored LoRA factors, scaled by `strength`, to every linear map."""

    def wrap(layer: int, role: str, name: str, module: nn.Module) -> nn.Module:
        lora_a, lora_b = read_factors(read, name)
        return AdaptedLinear(module, lora_a.to(dtype), lora_b.to(dtype), strength)

    return wrap


def packed_map(context: Context, reader: TensorReader, stage: str, layer: int, role: str) -> PackedLinear:
    """Q + L1 L2 of one linear map, from the tensors of decompose or prune."""
    return read_packed(reader.read, linear_name(layer, role), context.known.packed_shape(stage, layer, role))


def integer_modules(model: Model) -> dict[str, L4QLinear | QALoRALinear]:
    """Name to module of every linear map that becomes integers; an adapter beside it is not part of it."""
    return {
        name.removesuffix(".base"): module
        for name, module in model.named_modules()
        if isinstance(module, L4QLinear | QALoRALinear)
    }


def adaptable_modules(model: Model) -> dict[str, PackedLinear | LoRALinear]:
    """Name to module of every linear map of the blocks that an adapter can be attached to."""
    plain = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {**packed_modules(model), **plain}


def packed_modules(model: Model) -> dict[str, PackedLinear]:
    """Name to module of every packed linear map of the blocks."""
    maps = {
        name.removesuffix(".base"): module for name, module in model.named_modules() if isinstance(module, PackedLinear)
    }
    maps.pop(HEAD, None)
    return maps


def _base_linear(context: Context) -> LinearOf:
    reader, biased = context.base_reader, context.known.architecture.biased

    def linear(layer: int, role: str, name: str) -> nn.Module:
        bias = reader.read_float(f"{name}.bias", context.dtype) if role in biased else None
        return dense_linear(reader.read_float(f"{name}.weight", context.dtype), bias)

    return linear


def _sliced_linear(context: Context, make: Make) -> LinearOf:
    def linear(layer: int, role: str, name: str) -> nn.Module:
        return make(name, *sliced_base_weight(context, layer, role, name))

    return linear


def _tunable_linear(context: Context, read: Callable[[str], Tensor]) -> LinearOf:
    def linear(layer: int, role: str, name: str) -> nn.Module:
        shape = context.known.packed_shape("decompose", layer, role)
        return TunableLinear(shape, read_buffers(read, name, shape))

    return linear


def _layers(context: Context, architecture: Architecture, linear: LinearOf, reader: TensorReader) -> LayerStream:
    return LayerStream(
        load_config(context.base),
        architecture,
        linear,
        _other(context, reader),
        device=context.config.device,
    )


def _tables(context: Context, reader: TensorReader) -> dict[str, PackedShape]:
    """Embedding and head that `reader` has packed."""
    return {name: shape for name, shape in context.known.tables().items() if f"{name}.codes" in reader}


def _other(context: Context, reader: TensorReader) -> TensorOf:
    """Tensors beside linear maps in the compute dtype, packed tables made dense."""
    tables = _tables(context, reader)

    def other(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module in tables:
            return read_packed(reader.read, module, tables[module]).dequantized().to(context.dtype)
        return reader.read_float(name, context.dtype)

    return other


def _from_packed(
    context: Context,
    stage: str,
    architecture: Architecture,
    wrap: Wrap | None,
    *,
    dense: bool,
    slot: Callable[[str], tuple[Tensor, Tensor]] | None = None,
) -> Model:
    """`slot` gives A and B, to be added to the map of that name for good: frozen beside a packed one, merged into a
    dense one."""
    reader = context.reader(stage)

    def linear(layer: int, role: str, name: str) -> nn.Module:
        packed = packed_map(context, reader, stage, layer, role)
        lora_a, lora_b = slot(name) if slot else (None, None)
        if not dense:
            if lora_a is None or lora_b is None:
                return packed
            return AdaptedLinear(packed, lora_a.to(context.dtype), lora_b.to(context.dtype), 1.0)
        weight = packed.dequantized()
        if lora_a is not None and lora_b is not None:
            weight.addmm_(lora_b, lora_a)
        bias = None if packed.bias is None else packed.bias.to(context.dtype)
        return dense_linear(weight.to(context.dtype), bias)

    return _build(context, architecture, linear, reader, wrap, dense=dense)


def _build(
    context: Context,
    architecture: Architecture,
    linear: LinearOf,
    reader: TensorReader,
    wrap: Wrap | None,
    *,
    dense: bool = False,
) -> Model:
    """Tables that `reader` has packed stay so, or are made `dense` one after the other."""
    config: dict[str, Any] = load_config(context.base)
    tables = {} if dense else _tables(context, reader)

    def placed(layer: int, role: str, name: str) -> nn.Module:
        module = linear(layer, role, name)
        return wrap(layer, role, name, module) if wrap else module

    packed = {name: partial(read_table, reader.read, name, shape, context.dtype) for name, shape in tables.items()}
    other = _other(context, reader)
    return build(config, architecture, placed, other, device=context.config.device, packed=packed)

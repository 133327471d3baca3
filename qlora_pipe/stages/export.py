"""export: the PEFT adapter of the full model, the merged full model, the small model, dense and as integers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_pipe import layouts
from qlora_pipe.architectures import Architecture
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config_export import IntegerFormat
from qlora_pipe.exporters.bitsandbytes import write_bitsandbytes
from qlora_pipe.exporters.card import Origin, histogram, write_card
from qlora_pipe.exporters.compressed_tensors import write_compressed_tensors
from qlora_pipe.exporters.dense import write_dense
from qlora_pipe.exporters.gguf import write_gguf
from qlora_pipe.exporters.gptq import write_gptq
from qlora_pipe.exporters.peft import write_peft
from qlora_pipe.sources import base_name, find_model, read_config
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.compact import compact_strength
from qlora_pipe.stages.models import compensated_weight, integer_weight, sliced_base_weight
from qlora_pipe.stages.packing import read_factors, read_packed, small_settings
from qlora_pipe.stages.train import strength

Read = Callable[[str], Tensor]

_COMPACT = {
    "l4q": "L4Q integers, dequantised",
    "qat-lora": "QAT-LoRA integers, dequantised, with their adapter merged: not one integer model",
    "qa-lora": "QA-LoRA integers, dequantised",
    "lsq": "LSQ integers, dequantised",
}
"""What `small` holds, by method of compact."""


def run(context: Context) -> None:
    """Streams tensor by tensor. Peak bytes: a few matrices in fp32."""
    config, known = context.config, context.known
    base_config = read_config(context.base)
    exported: dict[str, Any] = {}
    recovery = context.read_json("recover", "recovery.json")
    scale = recovery["scale"]
    if config.export.peft:
        (context.out / "peft").mkdir()
        write_peft(
            context.out / "peft",
            layouts.peft_adapter(known.architecture, known.task_rank()),
            context.reader("recover", "adapter").read,
            base=base_name(config.model, Path(str(config.run))),
            rank=known.task_rank(),
            strength=strength(context),
            scale=scale,
        )
        moved = "what L1 L2 moved by in training, as trained minus as it was"
        factors = "as trained" if config.train.low_rank == "frozen" else moved
        as_trained = recovery["correction"] == "none"
        if not as_trained:
            factors += ", B corrected for the difference between the weights it was trained on and these"
        exact = scale == 1 and as_trained
        exported["peft"] = {"base": "the original model", "factors": factors, "scale": scale, "exact": exact}
    if config.export.merged:
        _dense(context, "merged", _merged(context, scale * strength(context)), base_config)
        exported["merged"] = {"weights": f"{config.recover.base} + adapter", "dtype": config.export.dtype}
    if config.export.small:
        read = _integers(context) if config.compact.enabled else _small(context)
        _dense(context, "small", read, small_settings(context, {}))
        slots = "adapters" if config.compensates else "adapter"
        quantised = "sparse Q" if config.prune.sparsity.enabled else "Q"
        base = "original weights" if config.train.base == "original" else f"{quantised} + L1 L2"
        trained = _COMPACT[config.compact.method] if config.compact.enabled else f"{base} + {slots}"
        exported["small"] = {"weights": trained, "dtype": config.export.dtype}
    for name, reason in known.integer_formats.items():
        exported[name] = _integer_model(context, name) if reason is None else {"left_out": reason}
    if config.export.packed:
        exported["bitsandbytes"] = _bitsandbytes(context, base_config)
    context.write_json("export.json", exported)
    origin = _origin(context)
    for folder, said in exported.items():
        if "left_out" not in said:
            write_card(context.out / folder, origin, said, recovery)


def _origin(context: Context) -> Origin:
    """What the cards of all folders say alike."""
    known, source = context.known, context.inputs["source"]
    allocation = context.read_json("allocate", "allocation.json")
    return Origin(
        model=context.config.model,
        hub=find_model(context.config.model).kind == "hub",
        license=context.read_json("source", "source.json")["license"],
        identity=source.manifest.inputs["model"],
        budget=context.config.decompose.budget,
        bits_per_weight=allocation["bits_per_weight"],
        gap=allocation["gap"],
        bits=histogram(choice.bits for choice in known.allocation.values()),
        integer_bits=histogram(known.integer_bits.values()) if context.config.compact.enabled else {},
    )


def _dense(context: Context, folder: str, read: Read, config: dict[str, Any]) -> None:
    (context.out / folder).mkdir()
    small = folder == "small"
    architecture = context.known.small if small else context.known.architecture
    dtype = context.config.export.dtype
    layout = layouts.dense(architecture, dtype)
    write_dense(context.out / folder, layout, read, config=config, base=context.base, dtype=dtype)


def _bitsandbytes(context: Context, config: dict[str, Any]) -> dict[str, Any]:
    """Write the full decomposed model for bitsandbytes; what is to be said of it."""
    known, dtype, folder = context.known, context.config.export.dtype, context.out / "bitsandbytes"
    folder.mkdir()
    layouts_of = known.outputs("export")
    write_bitsandbytes(
        folder,
        layouts_of["bitsandbytes/model"],
        layouts_of.get("bitsandbytes/adapter/adapter_model", {}),
        context.reader(known.full_packed).read,
        _dequantised(context, known.full_packed, known.architecture),
        maps=layouts.bitsandbytes_maps(known.architecture, known.allocation),
        config=config,
        base=context.base,
        dtype=dtype,
    )
    return {"weights": "Q of q, k, v, gate and up as NF4, Q + L1 L2 of o and down dense", "dtype": dtype}


def _integer_model(context: Context, name: IntegerFormat) -> dict[str, Any]:
    """Write the integer model in a format of other tools; what is to be said of it."""
    known, settings, reader = context.known, context.config, context.reader("compact")
    (context.out / name).mkdir()
    shared: dict[str, Any] = {
        "bits": {name: known.integer_bits[name] for _, _, name in known.small.linears()},
        "group_size": settings.compact.group_size,
        "config": small_settings(context, {}),
        "base": context.base,
        "dtype": settings.export.dtype,
    }
    layout = known.exported_integers(name)
    trained = settings.compact.steps or settings.compact.block_rows
    codes = "those of the last step of training" if trained else "what training would start from, rounded"
    weights = f"{settings.compact.method.upper()} integers, packed"
    said = {"weights": weights, "codes": codes, "dtype": settings.export.dtype}
    if name == "compressed-tensors":
        write_compressed_tensors(context.out / name, layout, reader.read, **shared)
        return said | {"steps": "float32, as trained", "exact": settings.export.dtype == "float32"}
    if name == "gguf":
        found = {"keys": known.gguf_keys, "architecture": known.small, "bits": shared["bits"]}
        changes = write_gguf(context.out / name, layout, reader.read, settings=settings.compact, **found)
        exact = not any(changes.values()) and settings.export.dtype == "float32"
        return said | {"steps": "float16", "exact": exact} | changes
    largest = write_gptq(context.out / name, layout, reader.read, version=name, **shared)
    return said | {"steps": "float16", "largest_change_of_a_step": largest, "exact": largest == 0}


def _merged(context: Context, factor: float) -> Read:
    """Weights of the deployed full model plus the scaled adapter."""
    full = context.known.architecture
    if context.config.recover.base == "original":
        dense: Read = context.base_reader.read_float
    else:
        dense = _dequantised(context, context.known.full_packed, full)
    return _adapted(dense, full, context.reader("recover", "adapter"), factor)


def _dequantised(context: Context, stage: str, architecture: Architecture) -> Read:
    """Weights of packed linear maps and tables, all else as stored."""
    reader, known = context.reader(stage), context.known
    shapes = {name: known.packed_shape(stage, layer, role) for layer, role, name in architecture.linears()}
    shapes |= known.tables()

    def read(tensor: str) -> Tensor:
        name, _, kind = tensor.rpartition(".")
        if kind != "weight" or name not in shapes:
            return reader.read_float(tensor)
        return read_packed(reader.read, name, shapes[name]).dequantized()

    return read


def _adapted(dense: Read, architecture: Architecture, adapter: TensorReader, factor: float) -> Read:
    """`dense` with factor * B A added to the weight of every linear map."""
    linears = {f"{name}.weight": name for _, _, name in architecture.linears()}

    def read(tensor: str) -> Tensor:
        if tensor not in linears:
            return dense(tensor)
        lora_a, lora_b = read_factors(adapter.read, linears[tensor])
        return dense(tensor).addmm(lora_b, lora_a, alpha=factor)

    return read


def _integers(context: Context) -> Read:
    """The trained integer model, dequantised: the very weights of the last training step. An adapter that was trained
    beside them is added."""
    reader = context.reader("compact")
    linears = {name for _, _, name in context.known.small.linears()}

    def read(tensor: str) -> Tensor:
        name, _, kind = tensor.rpartition(".")
        if kind == "weight" and name in linears:
            return integer_weight(context, reader, name)
        return reader.read_float(tensor)

    if context.config.compact.method != "qat-lora":
        return read
    return _adapted(read, context.known.small, context.reader("compact", "adapter"), compact_strength(context))


def _sliced(context: Context) -> Read:
    """The small model's original weights, slot C merged, as the task's adapter was trained on them."""
    places = {name: (layer, role) for layer, role, name in context.known.small.linears()}

    def read(tensor: str) -> Tensor:
        name, _, kind = tensor.rpartition(".")
        if name not in places:
            return context.base_reader.read_float(tensor)
        weight, bias = sliced_base_weight(context, *places[name], name)
        found = compensated_weight(context, name, weight) if kind == "weight" else bias
        assert found is not None
        return found.float()

    return read


def _small(context: Context) -> Read:
    """The pruned model with its adapters merged."""
    small, align = context.known.small, context.config.align
    if context.config.train.base == "original":
        dense = _sliced(context)
    else:
        dense = _dequantised(context, "prune", small)
        if context.config.compensates:
            dense = _adapted(dense, small, context.reader("align", "adapter"), align.alpha / align.rank)
    return _adapted(dense, small, context.reader("train", "adapter"), strength(context))


STAGE = Stage(
    "export",
    5,
    ("source", "allocate", "decompose", "refine", "select", "prune", "align", "train", "compact", "recover"),
    lambda config: (
        config.export.model_dump(mode="json")
        | {"compact": config.compact.enabled, "base": config.recover.base, "alpha": config.train.alpha}
        | {"base_name": base_name(config.model, Path(str(config.run)))}
    ),
    run,
)

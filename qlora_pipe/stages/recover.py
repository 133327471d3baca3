"""recover: the small model's adapter at the full model's shapes, and the scale at which it helps there (LoRAM)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from prune.correction import correct_adapter
from prune.groups import shape_of
from prune.scatter import scatter_adapter
from qlora_pipe import datasets, layouts
from qlora_pipe.hf.loss import score
from qlora_pipe.hf.model import AdaptedLinear, dense_linear, set_strength
from qlora_pipe.hf.sequences import Row
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.compact import compact_settings, compact_strength, first_integers
from qlora_pipe.stages.models import (
    base_model,
    compensated_weight,
    decomposed_model,
    integer_model,
    packed_map,
    sliced_base_model,
    sliced_base_weight,
    task_model,
    with_adapter,
)
from qlora_pipe.stages.packing import read_factors, write_factors
from qlora_pipe.stages.train import strength
from qlora_pipe.transfer import Losses, UnquantiseGap, choose_adapter, transfer_efficiency
from quant.grid import dequantize, offset_of

Read = Callable[[str], Tensor]


def run(context: Context) -> None:
    """Measure, then scatter what is best. Peak bytes: one full dense model with the adapter, and a corrected one."""
    config, known = context.config, context.known
    chosen = heldout_rows(context, config.recover.rows)
    adapters: dict[str, Read] = {"none": context.reader("train", "adapter").read}
    if config.recover.correction != "none":
        adapters[config.recover.correction] = _corrected(context).__getitem__
    found = {name: _loss_by_scale(context, chosen, read) for name, read in adapters.items()}
    correction, scale = choose_adapter(found)
    by_scale = found.pop(correction)
    _scatter(context, adapters[correction], "adapter", known.full_adapter())
    if config.compact_transfers:
        _scatter(context, context.reader("compact", "adapter").read, "compact_adapter", known.full_compact_adapter())
    losses = Losses(by_scale[0.0], by_scale[scale], *_small_losses(context, chosen))
    report: dict[str, Any] = {
        "base": config.recover.base,
        "scale": scale,
        "tau": transfer_efficiency(losses),
        "losses": losses._asdict(),
        "correction": correction,
        "loss_by_scale": by_scale,
        "rejected": [{"correction": name, "loss_by_scale": other} for name, other in found.items()],
        "rows": len(chosen),
        "tokens": sum(row.scored for row in chosen),
        "index_map": context.index_map.digest(),
    }
    if config.compact.enabled and config.compact.method == "l4q":
        report["unquantise_gap"] = _unquantise_gap(context, chosen)
    context.write_json("recovery.json", report)
    context.reporter.event("recovered", _verdict(report))


def heldout_rows(context: Context, count: int) -> list[Row]:
    """The first `count` held-out rows of the task: `recover.rows` of them choose the scale, evaluate takes others."""
    config = context.config
    records = datasets.load(config.data.task, "heldout", config.seed)
    return rows(
        load_tokenizer(context.base), records, length=config.evaluate.length, count=count, name=config.data.task.source
    )


def _scatter(context: Context, read: Read, stem: str, layout: layouts.Tensors) -> None:
    """Put the factors at the kept indices of full-size zeros, one matrix at a time."""
    with context.writer(layout, stem=stem) as writer:
        for layer, role, name in context.known.architecture.linears():
            write_factors(writer, name, *_scattered(context, read, layer, role, name))


def _scattered(context: Context, read: Read, layer: int, role: str, name: str) -> tuple[Tensor, Tensor]:
    kept, shape = context.index_map.kept_indices(layer, role), context.known.architecture.layers[layer]
    return scatter_adapter(*read_factors(read, name), role, kept, shape_of(role, shape))


def _corrected(context: Context) -> dict[str, Tensor]:
    """The small model's adapter, made up for what its weights differ by from those that are deployed, slot C left out.
    Peak bytes: the adapter and a few copies of a matrix."""
    reader, packed = context.reader("train", "adapter"), context.reader("prune")
    found: dict[str, Tensor] = {}
    for layer, role, name in context.known.small.linears():
        lora_a, lora_b = read_factors(reader.read, name)
        original = sliced_base_weight(context, layer, role, name)[0].float()
        difference = original - packed_map(context, packed, "prune", layer, role).dequantized()
        if context.config.recover.base == "decomposed":
            difference.neg_()
        found[f"{name}.lora_A.weight"] = lora_a
        found[f"{name}.lora_B.weight"] = correct_adapter(lora_a, lora_b, difference, strength(context))
    return found


def _loss_by_scale(context: Context, chosen: list[Row], read: Read) -> dict[float, float]:
    """Held-out loss of the full model by relative scale of the small adapter."""

    def wrap(layer: int, role: str, name: str, module: nn.Module) -> nn.Module:
        lora_a, lora_b = _scattered(context, read, layer, role, name)
        return AdaptedLinear(module, lora_a.to(context.dtype), lora_b.to(context.dtype), 0.0)

    model = (base_model if context.config.recover.base == "original" else decomposed_model)(context, wrap)
    found = {}
    with context.reporter.progress("trying scales", len(context.config.recover.scales)) as advance:
        for scale in context.config.recover.scales:
            set_strength(model, scale * strength(context))
            found[scale] = score(model, chosen).loss
            advance()
    return found


def _small_losses(context: Context, chosen: list[Row]) -> tuple[float, float]:
    """Held-out loss of the small model, slot C included, without and with its adapter."""
    model = task_model(context, with_adapter(context.reader("train", "adapter").read, 0.0, context.dtype))
    without = score(model, chosen).loss
    set_strength(model, strength(context))
    return without, score(model, chosen).loss


def _unquantise_gap(context: Context, chosen: list[Row]) -> dict[str, float | None]:
    """L4Q trained quant(W + BA): what is lost when BA is taken without the grid it was trained on, beside what BA
    gained; a slot C that it started from is no gain of its own."""
    config = context.config
    settings, first = config.compact, first_integers(context)
    wrap = with_adapter(context.reader("compact", "adapter").read, compact_strength(context), context.dtype)

    def nearest(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if settings.warm_start:
            weight = compensated_weight(context, name, weight)
        codes, step, trained = first(name, weight.float())
        offset = offset_of(settings.offset_at(context.known.integer_bits[name]), step, trained)
        return dense_linear(dequantize(codes, step, offset).to(weight.dtype), bias)

    def dense(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return dense_linear(weight, bias)

    return UnquantiseGap(
        quantised=score(integer_model(context, context.reader("compact")), chosen).loss,
        unquantised=score(sliced_base_model(context, dense, wrap), chosen).loss,
        without_adapter=score(sliced_base_model(context, nearest), chosen).loss,
    ).report()


def _verdict(report: dict[str, Any]) -> str:
    if report["scale"] == 0:
        return "the recovered adapter does not help the full model on held-out rows; it is exported with scale 0"
    tau = "none: the small model gained nothing" if report["tau"] is None else f"{report['tau']:.2f}"
    corrected = "" if report["correction"] == "none" else f", corrected ({report['correction']}),"
    return (
        f"the recovered adapter{corrected} helps the full model at scale {report['scale']} (transfer efficiency {tau})"
    )


STAGE = Stage(
    "recover",
    5,
    ("source", "calibrate", "allocate", "decompose", "refine", "select", "prune", "align", "train", "compact"),
    lambda config: (
        computing(config)
        | config.recover.model_dump(mode="json")
        | {"length": config.evaluate.length}
        | {"compact": compact_settings(config)}
        | {"alpha": config.train.alpha}
    ),
    run,
    lambda config: {"task": config.data.task},
)

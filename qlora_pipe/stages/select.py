"""select: score KV groups and FFN channels by the effective weights, and decide which stay; or which entries do."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.flap import flap, fluctuation, standardised
from prune.groups import ROLES, LayerShape
from prune.moments import variance
from prune.saliency import GroupScores, activation, random, wanda
from prune.select import keep_best
from prune.taylor import gates
from qlora_pipe.architectures import linear_name
from qlora_pipe.config import Config
from qlora_pipe.errors import StageError
from qlora_pipe.hf.masked import Removal
from qlora_pipe.hf.ramp import Ramp
from qlora_pipe.hf.sequences import take
from qlora_pipe.selection import Scores, decide, probes, record, scores_to_json, tabulate
from qlora_pipe.stages.base import Context, Stage, alike, computing
from qlora_pipe.stages.calibrate import calibration_rows
from qlora_pipe.stages.models import full_packed_model, packed_map, packed_modules
from qlora_pipe.stages.sparse import select_masks
from qlora_pipe.stages.train import fit, training_rows, write_adapter
from qlora_pipe.widths import prunable

Weight = Callable[[str], Tensor]
"""Role to the dense weight of one layer."""


def run(context: Context) -> None:
    """Peak bytes: one layer's packed tensors and one dense matrix of it; where losses are measured the packed model and
    a forward pass; with the method lora the packed model, slot C with its optimiser state, activations of one batch and
    one dense matrix; of single entries as `select_masks`."""
    settings, architecture = context.config.prune, context.known.architecture
    if settings.sparsity.enabled:
        select_masks(context)
        return
    try:
        scores = _guided(context) if settings.method == "lora" else _scores(context)
        measured = _measured(context, scores) if settings.measures else None
        table = tabulate(scores, architecture, settings, measured)
        counts, solution = decide(table, architecture, settings)
        kept = keep_best(scores, architecture.layers, counts)
    except PruneError as error:
        raise StageError(f"select: {error}") from error
    model = context.inputs["source"].manifest.inputs["model"]
    body = record(table, kept, solution, architecture, settings, model, measured)
    context.write_json("scores.json", scores_to_json(scores))
    context.write_json("table.json", table)
    context.write_json("kept.json", kept.to_json())
    context.write_json("selection.json", body)
    context.reporter.event("selected", _told(body), **{key: body[key] for key in ("true_reduction", "nominal")})


def _scores(context: Context) -> list[dict[str, Tensor]]:
    """Group scores of every layer that is not protected, from the weights the model really has: Q + L1 L2."""
    config, known = context.config, context.known
    generator = torch.Generator().manual_seed(config.seed)
    reader, free = context.reader(known.full_packed), prunable(known.architecture, config.prune)
    found: list[dict[str, Tensor]] = []
    with context.reporter.progress("scoring groups", len(known.architecture.layers)) as advance:
        for layer, shape in enumerate(known.architecture.layers):

            def weight(role: str, layer: int = layer) -> Tensor:
                return packed_map(context, reader, known.full_packed, layer, role).dequantized()

            if config.prune.method == "random":
                # Protected layers take their numbers too, so that protecting one changes no other.
                scores = random(shape, generator)
                found.append(scores if layer in free else {})
            elif layer not in free:
                found.append({})
            elif config.prune.method == "magnitude":
                found.append(_magnitude(weight, shape))
            else:
                found.append(_by_moments(context, layer, weight, shape))
            advance(f"layer {layer}")
    return found


def _measured(context: Context, scores: Scores) -> dict[str, float]:
    """How far predictions of generic text move (nats a token) with each layer's KV groups, and its FFN channels, at
    their least."""
    config, known = context.config, context.known
    settings, length = config.prune, config.calibrate.length
    found = take(calibration_rows(context, length, max(1, settings.tokens // length)), settings.tokens)
    moments = context.reader("calibrate", "moments")
    removal, losses = Removal(full_packed_model(context), found), {}
    tried = list(probes(scores, known.architecture, settings))
    with context.reporter.progress("measuring losses", len(tried)) as advance:
        for name, layer, kind, kept in tried:
            role = "o" if kind == "kv" else "down"
            place = linear_name(layer, role)
            mean = moments.read(f"{place}.mean") if settings.bias else None
            losses[name] = removal.divergence(place, kept.kept_indices(0, role), mean)
            advance(name)
    return losses


def _guided(context: Context) -> list[dict[str, Tensor]]:
    """Scores behind the last masks of LoRAPrune's loop; slot C, as it is when the loop ends, is written."""
    config, known = context.config, context.known
    generator = torch.Generator().manual_seed(config.seed)
    model = full_packed_model(context)
    modules = packed_modules(model)
    for module in modules.values():
        module.attach_adapter(config.align.rank, config.align.alpha, generator)
    counts, _ = decide({}, known.architecture, config.prune)
    ramp = Ramp(modules, known.architecture.layers, config.guide, counts)
    if config.guide.sides == "matched":
        ramp.match_sides(generator)
    chosen = training_rows(context, config.data.calibration, config.guide)
    log = fit(context, model, chosen, config.guide, watch=ramp)
    write_adapter(context, modules, known.architecture, config.align.rank)
    context.write_json("history.json", log)
    return [ramp.scores.get(layer, {}) for layer in range(len(known.architecture.layers))]


def _magnitude(weight: Weight, shape: LayerShape) -> dict[str, Tensor]:
    groups = GroupScores(shape)
    for role in ROLES:
        groups.add(role, weight(role))
    return groups.scores()


def _by_moments(context: Context, layer: int, weight: Weight, shape: LayerShape) -> dict[str, Tensor]:
    """Scores from what calibration saw at the inputs of o and down."""
    settings, reader = context.config.prune, context.reader("calibrate", "moments")
    across = settings.compares_scores
    found = {}
    for kind, role in (("kv", "o"), ("ffn", "down")):
        name = linear_name(layer, role)
        squares = reader.read(f"{name}.input")
        if settings.method == "taylor":
            found[kind] = gates(role, reader.read(f"{name}.gates"), shape)
        elif settings.method == "flap":
            seen = role, weight(role), variance(squares, reader.read(f"{name}.mean")), shape
            found[kind] = standardised(role, fluctuation(*seen), shape) if across else flap(*seen)
        else:
            by = activation if settings.method == "activation" else wanda
            found[kind] = by(role, weight(role), squares, shape, reader.read(f"{name}.gradient") if across else None)
    return found


def _told(body: Mapping[str, Any]) -> str:
    nominal = body["nominal"]
    return (
        f"{body['true_reduction']:.2%} of the blocks' parameters go: {nominal['kv']:.1%} of the KV groups and "
        f"{nominal['ffn']:.1%} of the FFN channels of layers that are not protected"
    )


def _settings(config: Config) -> dict[str, Any]:
    if config.prune.sparsity.enabled:
        return {"sparsity": config.prune.sparsity.model_dump(mode="json")}
    # A preset is what it stands for, the solver's time is not spent on uniform widths, and text is read to measure.
    allocated, measures = config.prune.widths == "allocated", config.prune.measures
    left_out = {"preset", "sparsity"}
    left_out |= (set() if allocated else {"losses", "time_limit"}) | (set() if measures else {"tokens"})
    found = {"seed": config.seed} | config.prune.model_dump(mode="json", exclude=left_out)
    if measures:
        found |= computing(config) | {"length": config.calibrate.length}
    if config.prune.method == "lora":
        slot = {"rank": config.align.rank, "alpha": config.align.alpha}
        found |= computing(config) | {"guide": config.guide.model_dump(mode="json", exclude={"save_steps"}) | slot}
    return found


STAGE = Stage(
    "select",
    2,
    ("source", "calibrate", "allocate", "decompose", "refine"),
    _settings,
    run,
    lambda config: (
        {"calibration": config.data.calibration} if config.prune.method == "lora" or config.prune.measures else {}
    ),
    work=lambda context: alike(run)(context) if context.config.prune.method == "lora" else None,
)

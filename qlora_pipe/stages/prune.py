"""prune: choose KV groups and FFN channels from the effective weights, then slice the codes; nothing is requantised."""

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import ROLES
from prune.saliency import GroupScores, activation, random
from prune.select import select
from qlora_pipe.architectures import linear_name
from qlora_pipe.errors import ConfigError
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.models import packed_map
from qlora_pipe.stages.packing import read_buffers
from quant.buffers import slice_rows


def run(context: Context) -> None:
    """Peak bytes: one layer's packed tensors and one dense matrix of it."""
    settings, known = context.config.prune, context.known
    scores = _scores(context)
    try:
        kept = select(
            scores,
            known.architecture.layers,
            kv_ratio=settings.kv_ratio,
            ffn_ratio=settings.ffn_ratio,
            align=settings.align,
            protect_first=settings.protect_first,
            protect_last=settings.protect_last,
        )
    except PruneError as error:
        raise ConfigError(f"prune: {error}") from error
    context.write_json("kept.json", kept.to_json())
    reader = context.reader(context.known.full_packed)
    with context.writer(known.pruned()) as writer:
        for layer, role, name in known.architecture.linears():
            shape = known.packed_shape("decompose", layer, role)
            buffers = read_buffers(reader.read, name, shape)
            sliced = slice_rows(buffers, shape, kept.kept_indices(layer, role))
            for buffer in known.packed_shape("prune", layer, role).buffers():
                writer.write(f"{name}.{buffer}", sliced[buffer])
        for name in known.outer():
            writer.write(name, reader.read(name))


def _scores(context: Context) -> list[dict[str, Tensor]]:
    """Group scores of every layer, from the weights the model really has: Q + L1 L2."""
    config, known = context.config, context.known
    generator = torch.Generator().manual_seed(config.seed)
    reader = context.reader(context.known.full_packed)
    found = []
    moments = context.reader("calibrate", "moments")

    def weight(layer: int, role: str) -> Tensor:
        return packed_map(context, reader, known.full_packed, layer, role).dequantized()

    with context.reporter.progress("scoring groups", len(known.architecture.layers)) as advance:
        for layer, shape in enumerate(known.architecture.layers):
            if config.prune.method == "random":
                found.append(random(shape, generator))
            elif config.prune.method == "magnitude":
                groups = GroupScores(shape)
                for role in ROLES:
                    groups.add(role, weight(layer, role))
                found.append(groups.scores())
            else:
                scores = {}
                for kind, role in (("kv", "o"), ("ffn", "down")):
                    squares = moments.read(f"{linear_name(layer, role)}.input")
                    scores[kind] = activation(role, weight(layer, role), squares, shape)
                found.append(scores)
            advance()
    return found


STAGE = Stage(
    "prune",
    2,
    ("calibrate", "allocate", "decompose", "refine"),
    lambda config: {"seed": config.seed} | config.prune.model_dump(mode="json"),
    run,
)

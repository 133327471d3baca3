"""prune: choose KV groups and FFN channels from the effective weights, then slice the codes; nothing is requantised."""

import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import ROLES
from prune.indexmap import IndexMap
from prune.saliency import GroupScores, activation, random
from prune.select import select
from qlora_pipe import layouts
from qlora_pipe.architectures import linear_name
from qlora_pipe.errors import ConfigError
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.models import packed_map

_BY_ROW = ("codes", "scale_codes", "scale_max")


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
    reader = context.reader("decompose")
    with context.writer(known.pruned()) as writer:
        for layer, role, name in known.architecture.linears():
            shape = layouts.packed_shape(
                known.architecture, layer, role, known.allocation[name], context.config.decompose
            )
            for buffer in shape.buffers():
                tensor = reader.read(f"{name}.{buffer}")
                writer.write(f"{name}.{buffer}", _sliced(buffer, tensor, shape.transposed, kept, layer, role))
        for name in known.architecture.others():
            writer.write(name, reader.read(name))


def _sliced(buffer: str, tensor: Tensor, transposed: bool, kept: IndexMap, layer: int, role: str) -> Tensor:
    """Rows of everything that follows the pruned axis; the other low-rank factor and the offset stay whole."""
    indices = kept.kept_indices(layer, role)
    if buffer in _BY_ROW or (not transposed and buffer in ("lowrank_left", "bias")):
        return tensor[indices]
    if transposed and buffer == "lowrank_right":
        return tensor[:, indices]
    return tensor


def _scores(context: Context) -> list[dict[str, Tensor]]:
    """Group scores of every layer, from the weights the model really has: Q + L1 L2."""
    config, known = context.config, context.known
    generator = torch.Generator().manual_seed(config.seed)
    reader = context.reader("decompose")
    found = []
    moments = context.reader("calibrate", "moments")

    def weight(layer: int, role: str) -> Tensor:
        return packed_map(context, reader, known.architecture, layer, role).dequantized()

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
    1,
    ("calibrate", "allocate", "decompose"),
    lambda config: {"seed": config.seed} | config.prune.model_dump(mode="json"),
    run,
)

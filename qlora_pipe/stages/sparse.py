"""What select and prune do where single entries go: masks, and codes that are found again under them.

Q is what gets zeros, and what is ranked is what Q stands for: the original weight less the low-rank part.
"""

from collections.abc import Callable

from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import PRUNED_AXIS
from prune.indexmap import IndexMap
from prune.sparse import inverse_root, pack_mask, sparsegpt_mask, unpack_mask, wanda_mask
from qlora_pipe import layouts
from qlora_pipe.architectures import linear_name
from qlora_pipe.errors import StageError
from qlora_pipe.sparsity import record
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.moments import Moments
from qlora_pipe.stages.packing import read_buffers
from quant.masked import masked_buffers, residual

Cut = Callable[[int, str, dict[str, Tensor]], dict[str, Tensor]]
"""(layer, role, buffers of the full map) to those of the small one."""


def select_masks(context: Context) -> None:
    """One mask a linear map, and an index map that keeps everything.

    Peak bytes: the packed tensors of one linear map, four fp32 matrices of it, and of one input the covariance twice
    and what inverts it, 32 an entry."""
    known, zeros = context.known, dict[str, int]()
    rank, names = _ranking(context), known.architecture.linear_shapes()
    with (
        context.writer(layouts.masks(known.architecture), stem="masks") as writer,
        context.reporter.progress("choosing entries", len(names)) as advance,
    ):
        for layer, role, name in known.architecture.linears():
            try:
                mask = rank(layer, role)
            except PruneError as error:
                raise StageError(f"select: {name}: {error}") from error
            writer.write(f"{name}.mask", pack_mask(mask))
            zeros[name] = int(mask.sum())
            advance(name)
    kept = IndexMap.identity(known.architecture.layers)
    model = context.inputs["source"].manifest.inputs["model"]
    body = record(zeros, known.architecture, context.config.prune.sparsity, model, kept.digest())
    context.write_json("kept.json", kept.to_json())
    context.write_json("selection.json", body)
    told = f"{body['true_sparsity']:.2%} of the entries of the blocks' linear maps go, no shape changes"
    context.reporter.event("selected", told, true_sparsity=body["true_sparsity"])


def _ranking(context: Context) -> Callable[[int, str], Tensor]:
    """Layer and role to the mask of that map; what maps that read the same input share is made once."""
    known, settings = context.known, context.config.prune.sparsity
    reader, moments = context.reader(known.full_packed), context.reader("calibrate", "moments")
    covariances, damping = Moments(context), context.config.decompose.damping
    last: tuple[Tensor, Tensor] | None = None

    def rank(layer: int, role: str) -> Tensor:
        nonlocal last
        name, shape = linear_name(layer, role), known.packed_shape(known.full_packed, layer, role)
        wanted = residual(
            context.base_reader.read_float(f"{name}.weight"),
            read_buffers(reader.read, name, shape),
        )
        if settings.by == "wanda":
            return wanda_mask(wanted, moments.read(f"{name}.input").sqrt(), settings.ratio, settings.group)
        covariance = covariances.covariance(layer, role)
        if last is None or last[0] is not covariance:
            last = covariance, inverse_root(covariance, damping)
        return sparsegpt_mask(wanted, last[1], settings.ratio, settings.group)

    return rank


def masking(context: Context) -> Cut:
    """The same map with exact zeros where its mask says.

    Peak bytes beside the packed tensors: five fp32 matrices of the map, its mask, and of one input the covariance twice
    and what rounding needs of it, 24 an entry."""
    known, moments, masks = context.known, Moments(context), context.reader("select", "masks")

    def cut(layer: int, role: str, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        name, shape = linear_name(layer, role), known.packed_shape("prune", layer, role)
        block = None if PRUNED_AXIS[role] == "columns" else shape.choice.block_size
        return masked_buffers(
            context.base_reader.read_float(f"{name}.weight"),
            unpack_mask(masks.read(f"{name}.mask"), shape.in_features),
            buffers,
            shape,
            moments.feedback(layer, role, block),
        )

    return cut

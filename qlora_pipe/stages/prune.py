"""prune: cut out of the codes what `select` does not keep; nothing is requantised. Where single entries go, Q gets
exact zeros: its codes are found again around them, and all else stays.

The artifact is a Hugging Face folder, as that of decompose, whether or not the layers have equal widths.
"""

from collections.abc import Mapping

from torch import Tensor

from prune.flap import mean_bias
from prune.groups import PRUNED_AXIS
from qlora_pipe.architectures import linear_name
from qlora_pipe.exporters.dense import write_settings
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.packing import packed_linear, packings_of, read_buffers, small_settings
from qlora_pipe.stages.sparse import Cut, masking
from quant.buffers import slice_rows


def run(context: Context) -> None:
    """Peak bytes: the packed tensors of one linear map; where the mean of what goes stays also its dense weight, where
    single entries go what `masking` says."""
    known = context.known
    cut = masking(context) if context.config.prune.sparsity.enabled else _slicing(context)
    reader = context.reader(known.full_packed)
    with context.writer(known.pruned()) as writer:
        for layer, role, name in known.architecture.linears():
            shape = known.packed_shape("decompose", layer, role)
            buffers = read_buffers(reader.read, name, shape)
            small = cut(layer, role, buffers)
            for buffer in known.packed_shape("prune", layer, role).buffers():
                writer.write(f"{name}.{buffer}", small[buffer])
        for name in known.outer():
            writer.write(name, reader.read(name))
    write_settings(context.out, small_settings(context, packings_of(context, "prune")), context.base)


def _slicing(context: Context) -> Cut:
    """The kept rows of the stored matrix, bit for bit, and with `prune.bias` what the others add on average."""
    known, kept, settings = context.known, context.index_map, context.config.prune
    moments = context.reader("calibrate", "moments")

    def cut(layer: int, role: str, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shape, indices = known.packed_shape("decompose", layer, role), kept.kept_indices(layer, role)
        sliced = slice_rows(buffers, shape, indices)
        if settings.leaves_bias and PRUNED_AXIS[role] == "columns":
            weight, mean = packed_linear(shape, buffers).dequantized(), moments.read(f"{linear_name(layer, role)}.mean")
            sliced["bias"] = mean_bias(role, weight, mean, indices, kept.original[layer], sliced.get("bias"))
        return sliced

    return cut


STAGE = Stage(
    "prune",
    5,
    ("source", "calibrate", "allocate", "decompose", "refine", "select"),
    lambda config: {"bias": config.prune.leaves_bias},
    run,
)

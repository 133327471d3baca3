"""prune: cut out of the codes what `select` does not keep; nothing is requantised.

The artifact is a Hugging Face folder, as that of decompose, whether or not the layers have equal widths.
"""

from prune.flap import mean_bias
from prune.groups import PRUNED_AXIS
from qlora_pipe.exporters.dense import write_settings
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.packing import packed_linear, packings_of, read_buffers, small_settings
from quant.buffers import slice_rows


def run(context: Context) -> None:
    """Peak bytes: the packed tensors of one linear map, and where the mean of what goes stays its dense weight."""
    known, kept = context.known, context.index_map
    reader, moments = context.reader(known.full_packed), context.reader("calibrate", "moments")
    with context.writer(known.pruned()) as writer:
        for layer, role, name in known.architecture.linears():
            shape = known.packed_shape("decompose", layer, role)
            buffers = read_buffers(reader.read, name, shape)
            sliced = slice_rows(buffers, shape, kept.kept_indices(layer, role))
            if context.config.prune.leaves_bias and PRUNED_AXIS[role] == "columns":
                weight, mean = packed_linear(shape, buffers).dequantized(), moments.read(f"{name}.mean")
                indices, full, bias = kept.kept_indices(layer, role), kept.original[layer], sliced.get("bias")
                sliced["bias"] = mean_bias(role, weight, mean, indices, full, bias)
            for buffer in known.packed_shape("prune", layer, role).buffers():
                writer.write(f"{name}.{buffer}", sliced[buffer])
        for name in known.outer():
            writer.write(name, reader.read(name))
    write_settings(context.out, small_settings(context, packings_of(context, "prune")), context.base)


STAGE = Stage(
    "prune",
    5,
    ("source", "calibrate", "allocate", "decompose", "refine", "select"),
    lambda config: {"bias": config.prune.leaves_bias},
    run,
)

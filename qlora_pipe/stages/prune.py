"""prune: cut out of the codes what `select` does not keep; nothing is requantised. Where single entries go, Q gets
exact zeros: its codes are found again around them, and all else stays.

The artifact is a Hugging Face folder, as that of decompose, whether or not the layers have equal widths.
"""

from dataclasses import replace

from qlora_pipe.exporters.packed import write_packed_settings
from qlora_pipe.hf.model import small_config
from qlora_pipe.sources import read_config
from qlora_pipe.stages.base import Context, Stage
from qlora_pipe.stages.packing import packings_of, read_buffers
from qlora_pipe.stages.sparse import Cut, masking
from quant.buffers import slice_rows


def run(context: Context) -> None:
    """Peak bytes: the packed tensors of one linear map; where single entries go also as `masking`."""
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
    _write_settings(context)


def _slicing(context: Context) -> Cut:
    """The kept rows of the stored matrix, bit for bit."""
    known, kept = context.known, context.index_map
    return lambda layer, role, buffers: slice_rows(
        buffers, known.packed_shape("decompose", layer, role), kept.kept_indices(layer, role)
    )


def _write_settings(context: Context) -> None:
    """config.json has the small widths if all layers have the same; else the original ones, which the sides of
    `quantization_config` correct map by map."""
    small, full = context.known.small, context.known.architecture
    config, packings = read_config(context.base), packings_of(context, "prune")
    if len(set(small.layers)) == 1:
        config = small_config(config, small)
    else:
        implied = full.linear_shapes()
        for name, sides in small.linear_shapes().items():
            if sides != implied[name]:
                packings[name] = replace(packings[name], sides=sides)
    write_packed_settings(context.out, packings, config=config, base=context.base)


STAGE = Stage(
    "prune",
    5,
    ("source", "calibrate", "allocate", "decompose", "refine", "select"),
    lambda config: {},
    run,
)

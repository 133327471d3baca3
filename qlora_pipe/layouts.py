"""What each stage writes, tensor by tensor. The plan adds these layouts up; the stages write exactly these."""

import json
from collections.abc import Mapping

from prune.groups import PRUNED_AXIS, ROLES, shape_of
from qlora_pipe.architectures import EMBEDDING, HEAD, SITES, Architecture, covariance_name, linear_name
from qlora_pipe.artifacts.layout import DTYPE_BYTES, DTYPE_CODE, TensorSpec
from qlora_pipe.config import Calibrate
from qlora_pipe.config_training import Compact
from quant.storage import WORD_BITS, Choice, PackedShape, packed_columns

Tensors = dict[str, TensorSpec]

BITSANDBYTES_STATE = "quant_state.bitsandbytes__nf4"

_TABLE_BLOCKS = range(16, 129)
"""Weights that share a scale in a packed embedding: 2 bytes of scale to 16 of codes at most."""


def moments(architecture: Architecture, settings: Calibrate) -> Tensors:
    """Per linear map: mean square of its inputs [in] and of its output gradients [out]; where columns are pruned also
    the mean of its inputs [in] and their gate moments [sequences, in]; per distinct input: the lower triangle of its
    covariance.
    """
    found: Tensors = {}
    for layer, role, name in architecture.linears():
        rows, columns = shape_of(role, architecture.layers[layer])
        found[f"{name}.input"] = TensorSpec("F32", (columns,))
        found[f"{name}.gradient"] = TensorSpec("F32", (rows,))
        if PRUNED_AXIS[role] == "columns":
            found[f"{name}.mean"] = TensorSpec("F32", (columns,))
            found[f"{name}.gates"] = TensorSpec("F32", (settings.sequences, columns))
    if settings.covariance:
        for layer in range(len(architecture.layers)):
            for site in SITES:
                width = architecture.site_width(layer, site)
                found[covariance_name(layer, site)] = TensorSpec("F32", (width * (width + 1) // 2,))
    return found


def packed_shape(architecture: Architecture, layer: int, role: str, choice: Choice) -> PackedShape:
    """How one linear map is stored: the axis that pruning cuts is the row axis."""
    rows, columns = shape_of(role, architecture.layers[layer])
    return PackedShape(
        in_features=columns,
        out_features=rows,
        choice=choice,
        transposed=PRUNED_AXIS[role] == "columns",
        bias=role in architecture.biased,
    )


def packed_bytes(shape: PackedShape) -> int:
    """Bytes of the tensors of one packed linear map."""
    return sum(spec.nbytes for spec in packed("", shape).values())


def packed(name: str, shape: PackedShape) -> Tensors:
    """The tensors of one packed linear map."""
    return {
        f"{name}.{buffer}": TensorSpec(DTYPE_CODE[dtype], size) for buffer, (dtype, size) in shape.buffers().items()
    }


def masks(architecture: Architecture) -> Tensors:
    """A bit for every entry of every linear map, rows [out] padded to whole bytes; see `prune.sparse.pack_mask`."""
    return {
        f"{name}.mask": TensorSpec("U8", (rows, -(-columns // 8)))
        for name, (rows, columns) in architecture.linear_shapes().items()
    }


def decomposed(
    architecture: Architecture, dtypes: Mapping[str, str], allocation: Mapping[str, Choice], embeddings: str
) -> Tensors:
    """The packed model, whole or pruned: `outer`, and packed linear maps."""
    found = outer(architecture, dtypes, embeddings)
    for layer, role, name in architecture.linears():
        found |= packed(name, packed_shape(architecture, layer, role, allocation[name]))
    return found


def outer(architecture: Architecture, dtypes: Mapping[str, str], embeddings: str) -> Tensors:
    """All of the packed model but its linear maps: the tables packed, other tensors as the checkpoint has them."""
    found = others(architecture, dtypes)
    for name, shape in tables(architecture, embeddings).items():
        del found[f"{name}.weight"]
        found |= packed(name, shape)
    return found


def tables(architecture: Architecture, embeddings: str) -> dict[str, PackedShape]:
    """How the packed model stores embedding and head, by module name; none where `embeddings` is "keep".

    "int8": signed integers, float16 scales for blocks along the hidden axis, the largest of 16 to 128 weights that
    divide it, else whole rows. A tied head is the embedding.
    """
    if embeddings == "keep":
        return {}
    hidden = architecture.hidden
    block = max((size for size in _TABLE_BLOCKS if hidden % size == 0), default=hidden)
    shape = PackedShape(hidden, architecture.vocab, Choice("int", 8, block, 0, 16, "float16"), transposed=False)
    return dict.fromkeys((EMBEDDING,) if architecture.tied else (EMBEDDING, HEAD), shape)


def others(architecture: Architecture, dtypes: Mapping[str, str]) -> Tensors:
    """Embeddings, norms and head in the dtype of the checkpoint."""
    return {name: TensorSpec(dtypes.get(name, "F32"), shape) for name, shape in architecture.others().items()}


Rank = int | Mapping[str, int]
"""Of an adapter's factors: the same everywhere, or by linear map."""


def adapter(architecture: Architecture, rank: Rank) -> Tensors:
    """LoRA factors of every linear map: A [rank, in] and B [out, rank]."""
    found: Tensors = {}
    for layer, role, name in architecture.linears():
        rows, columns = shape_of(role, architecture.layers[layer])
        size = rank if isinstance(rank, int) else rank[name]
        found[f"{name}.lora_A.weight"] = TensorSpec("F32", (size, columns))
        found[f"{name}.lora_B.weight"] = TensorSpec("F32", (rows, size))
    return found


def peft_adapter(architecture: Architecture, rank: Rank) -> Tensors:
    """The same under the names PEFT gives them."""
    return {f"base_model.model.{name}": spec for name, spec in adapter(architecture, rank).items()}


def integers(
    architecture: Architecture, dtypes: Mapping[str, str], settings: Compact, bits: Mapping[str, int]
) -> Tensors:
    """The L4Q model: packed codes, step sizes and trained offsets of every linear map, biases, all other tensors."""
    found = others(architecture, dtypes)
    for layer, role, name in architecture.linears():
        rows, columns = shape_of(role, architecture.layers[layer])
        found[f"{name}.codes"] = TensorSpec("I32", (rows, packed_columns(columns, bits[name])))
        found[f"{name}.scale"] = TensorSpec("F32", (rows, columns // settings.group_size))
        if settings.trains_offsets:
            found[f"{name}.offset"] = found[f"{name}.scale"]
        if role in architecture.biased:
            found[f"{name}.bias"] = TensorSpec("F32", (rows,))
    return found


def compressed_tensors(architecture: Architecture, dtype: str, settings: Compact, bits: Mapping[str, int]) -> Tensors:
    """The same in the names and packing of compressed-tensors; `dtype`, a torch dtype's name, is of all that is
    neither a code nor a step."""
    found = _unquantised(architecture, dtype)
    for name, (rows, columns) in architecture.linear_shapes().items():
        found[f"{name}.weight_packed"] = TensorSpec("I32", (rows, -(-columns * bits[name] // WORD_BITS)))
        found[f"{name}.weight_scale"] = TensorSpec("F32", (rows, columns // settings.group_size))
        found[f"{name}.weight_shape"] = TensorSpec("I64", (2,))
    return found


def gptq(architecture: Architecture, dtype: str, settings: Compact, bits: Mapping[str, int]) -> Tensors:
    """The same as a GPTQ checkpoint, of either version: steps and biases in fp16, matrices transposed."""
    found = _unquantised(architecture, dtype)
    for name, (rows, columns) in architecture.linear_shapes().items():
        groups, width = columns // settings.group_size, bits[name]
        found[f"{name}.qweight"] = TensorSpec("I32", (columns * width // WORD_BITS, rows))
        found[f"{name}.qzeros"] = TensorSpec("I32", (groups, rows * width // WORD_BITS))
        found[f"{name}.scales"] = TensorSpec("F16", (groups, rows))
        found[f"{name}.g_idx"] = TensorSpec("I32", (columns,))
        if f"{name}.bias" in found:
            found[f"{name}.bias"] = TensorSpec("F16", (rows,))
    return found


def bitsandbytes_maps(architecture: Architecture, allocation: Mapping[str, Choice]) -> dict[str, PackedShape]:
    """The linear maps that bitsandbytes can hold, whose blocks run along the input; of o and down they do not."""
    shapes = {
        name: packed_shape(architecture, layer, role, allocation[name]) for layer, role, name in architecture.linears()
    }
    return {name: shape for name, shape in shapes.items() if not shape.transposed}


def bitsandbytes_state(shape: PackedShape, dtype: str) -> bytes:
    """What bitsandbytes keeps of a matrix beside its tensors, as JSON."""
    sides = [shape.out_features, shape.in_features]
    state = {"quant_type": "nf4", "blocksize": shape.choice.block_size, "dtype": dtype, "shape": sides}
    return json.dumps(state).encode()


def bitsandbytes(architecture: Architecture, dtype: str, allocation: Mapping[str, Choice]) -> Tensors:
    """The decomposed model as NF4 of bitsandbytes, without low-rank parts; all else, o and down whole, in `dtype`."""
    found = dense(architecture, dtype)
    for name, shape in bitsandbytes_maps(architecture, allocation).items():
        weights = shape.rows * shape.columns
        found[f"{name}.weight"] = TensorSpec("U8", (weights // 2, 1))
        found[f"{name}.weight.absmax"] = TensorSpec("F32", (weights // shape.choice.block_size,))
        found[f"{name}.weight.quant_map"] = TensorSpec("F32", (2**shape.choice.bits,))
        found[f"{name}.weight.{BITSANDBYTES_STATE}"] = TensorSpec("U8", (len(bitsandbytes_state(shape, dtype)),))
    return found


def bitsandbytes_adapter(architecture: Architecture, allocation: Mapping[str, Choice]) -> Tensors:
    """The low-rank parts of these maps under the names PEFT gives them; empty if none has one."""
    ranks = {name: shape.choice.rank for name, shape in bitsandbytes_maps(architecture, allocation).items()}
    every = dict.fromkeys(architecture.linear_shapes(), 0) | ranks
    return {name: spec for name, spec in peft_adapter(architecture, every).items() if spec.elements}


def _unquantised(architecture: Architecture, dtype: str) -> Tensors:
    """A plain checkpoint without the weights of linear maps."""
    weights = {f"{name}.weight" for name in architecture.linear_shapes()}
    return {name: spec for name, spec in dense(architecture, dtype).items() if name not in weights}


def dense(architecture: Architecture, dtype: str) -> Tensors:
    """A plain checkpoint; `dtype` is a torch dtype's name."""
    return {name: TensorSpec(DTYPE_CODE[dtype], shape) for name, shape in architecture.tensors().items()}


def linear_bytes(tensors: Tensors, architecture: Architecture) -> int:
    """Bytes of the tensors that belong to block linears."""
    prefixes = tuple(f"{linear_name(layer, role)}." for layer in range(len(architecture.layers)) for role in ROLES)
    return sum(spec.nbytes for name, spec in tensors.items() if name.startswith(prefixes))


def tensor_bytes(tensors: Tensors) -> int:
    """Bytes of all tensors, headers not counted."""
    return sum(spec.elements * DTYPE_BYTES[spec.dtype] for spec in tensors.values())

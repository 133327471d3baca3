"""The integer model as a GGUF file: names, kinds and exact bytes, known before a weight is touched; needs no torch.

A file is a magic number, keys with values, a table of tensors, and their data, each part padded (the GGUF
specification of the ggml project). Matrices are blocks of 32 weights along the input, a fp16 step to each.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune.groups import ROLES
from qlora_pipe.architectures import EMBEDDING, FINAL_NORM, HEAD, Architecture, linear_name
from qlora_pipe.artifacts.layout import DTYPE_CODE, Layout, TensorSpec
from qlora_pipe.config_training import Compact
from qlora_pipe.errors import ConfigError
from qlora_pipe.gguf_header import LINEARS
from qlora_pipe.gguf_tokens import INSTEAD, Keys, array_type, tokenizer_keys
from qlora_pipe.sources import read_config
from quant.storage import GGUF_BLOCK

FILE = "model.gguf"

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block: a step, the offset of Q4_1, codes."""

FAMILIES = ("llama", "qwen2", "qwen3")
"""Those whose names and order of rows readers of GGUF share with us."""

_FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}
_QUANTIZATION_VERSION = 2
_ALIGNMENT = 32
_PREAMBLE = 24
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_OUTER = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}


def block_kind(bits: int, settings: Compact) -> str:
    """The kind of the blocks that hold a matrix of `bits`, 4 or 8; only 4 bits have one with offsets."""
    return "Q8_0" if bits == 8 else "Q4_0" if settings.offset_at(bits) == "zero" else "Q4_1"


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a checkpoint of `FAMILIES`."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    if part.endswith("_norm"):
        found = f"attn_{part.removeprefix('self_attn.')}"
    elif part in _NORMS:
        found = _NORMS[part]
    else:
        found = next(gguf for role, gguf in zip(ROLES, LINEARS, strict=True) if linear_name(int(layer), role) == module)
    return f"blk.{layer}.{found}.{kind}"


def gguf_tensors(
    architecture: Architecture, dtype: str, settings: Compact, bits: Mapping[str, int]
) -> dict[str, TensorSpec]:
    """The tensors in the file's names: matrices as bytes of blocks, embedding and head in `dtype`, norms and biases
    in fp32, which is what readers compute them in."""
    found = {}
    for name, shape in architecture.tensors().items():
        module = name.rpartition(".")[0]
        spec = TensorSpec("F32" if len(shape) == 1 else DTYPE_CODE[dtype], shape)
        if module in bits and len(shape) == 2:
            rows, columns = shape
            spec = TensorSpec("U8", (rows, columns // GGUF_BLOCK * BLOCK_BYTES[block_kind(bits[module], settings)]))
        found[gguf_name(name)] = spec
    return found


def gguf_keys(folder: Path, architecture: Architecture, settings: Compact, bits: Mapping[str, int]) -> Keys:
    """The keys of the file of a model with the widths of `architecture`, made from the base in `folder`: its
    config.json and its tokenizer.

    Raises SourceError if they cannot be read, ConfigError if readers of GGUF would take the model for another.
    """
    kind, shape, config = architecture.model_type, architecture.layers[0], read_config(folder)
    rope: Mapping[str, Any] = config.get("rope_parameters") or config
    scaling = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    rotary = scaling.get("rope_type", scaling.get("type", "default"))
    for differs, what in (
        (rotary != "default", f"with {rotary} rotary scaling"),
        (config.get("hidden_act", "silu") != "silu", f"with the activation {config.get('hidden_act')}"),
        (config.get("use_sliding_window"), "with sliding windows"),
        (
            None in (rope.get("rope_theta"), config.get("rms_norm_eps"), config.get("max_position_embeddings")),
            "whose config.json has no rope_theta, rms_norm_eps or max_position_embeddings",
        ),
    ):
        if differs:
            raise ConfigError(f"{folder}: readers of GGUF have no {kind} model {what}: {INSTEAD}")
    widths = [block_kind(each, settings) for each in bits.values()]
    found: Keys = {
        "general.architecture": kind,
        "general.file_type": _FILE_TYPES[max(set(widths), key=widths.count)],
        "general.quantization_version": _QUANTIZATION_VERSION,
        f"{kind}.vocab_size": architecture.vocab,
        f"{kind}.context_length": int(config["max_position_embeddings"]),
        f"{kind}.embedding_length": shape.hidden,
        f"{kind}.block_count": len(architecture.layers),
        f"{kind}.feed_forward_length": shape.ffn,
        f"{kind}.attention.head_count": shape.heads,
        f"{kind}.attention.head_count_kv": shape.kv_heads,
        f"{kind}.attention.key_length": shape.head_dim,
        f"{kind}.attention.value_length": shape.head_dim,
        f"{kind}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{kind}.rope.dimension_count": shape.head_dim,
        f"{kind}.rope.freq_base": float(rope["rope_theta"]),
    }
    return found | tokenizer_keys(folder, architecture.vocab)


def gguf_bytes(layout: Layout, keys: Keys) -> int:
    """Exact size in bytes of the file of `layout` and `keys`."""
    entries = sum(_text_bytes(name) + 4 + 8 * len(spec.shape) + 12 for name, spec in layout.items())
    head = _PREAMBLE + sum(_text_bytes(key) + 4 + _value_bytes(value) for key, value in keys.items()) + entries
    return _padded(head) + sum(_padded(spec.nbytes) for spec in layout.values())


def _value_bytes(value: object) -> int:
    match value:
        case bool():
            return 1
        case str():
            return _text_bytes(value)
        case list():
            return 12 + (4 * len(value) if array_type(value) is int else sum(map(_text_bytes, value)))
        case _:
            return 4


def _text_bytes(text: str) -> int:
    return 8 + len(text.encode())


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

"""Reading a GGUF header: sizes for the plan, without the weights and without the vocabulary.

Layout: magic, version, tensor count, key count, then typed key-value pairs, then tensor names, shapes, types, offsets
(the GGUF specification of the ggml project). The full reader of the `gguf` package parses every token of the
vocabulary, which takes seconds; the plan needs a dozen integers.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO

from qlora_pipe.errors import SourceError, UnsupportedModel

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 2**24
_MOST_ENTRIES = 2**24
_MOST_DIMENSIONS = 8

_MODEL_TYPES = {name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2")} | {"gemma3": "gemma3_text"}
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}


LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""A layer's linear maps, in the order of `prune.groups.ROLES`."""

_PER_LAYER = tuple(f"{part}.weight" for part in (*LINEARS, "attn_norm", "ffn_norm"))
_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
_POST_NORMS = ("post_attention_norm.weight", "post_ffw_norm.weight")
_FURTHER = {"qwen2": _BIASES, "qwen3": _HEAD_NORMS, "gemma2": _POST_NORMS, "gemma3": _HEAD_NORMS + _POST_NORMS}


class _Length(int):
    """The length of an array that was stepped over; no size may be one."""


class _Stream:
    """A file with the primitive reads of GGUF."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.exactly(struct.calcsize(f"<{code}")))[0]

    def exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        if len(data) != count:
            raise ValueError("the file ends inside its header")
        return data

    def string(self) -> str:
        length = self.scalar("Q")
        if length > _LONGEST_STRING:
            raise ValueError(f"a string of {length} bytes")
        return self.exactly(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._skip_array()
        if kind not in _SCALARS:
            raise ValueError(f"a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def _skip_array(self) -> _Length:
        """Step over an array; its length is all the plan needs (the vocabulary's, for one)."""
        kind, count = self.scalar("I"), self.scalar("Q")
        if count > _MOST_ENTRIES:
            raise ValueError(f"an array of {count} entries")
        if kind in _SCALARS:
            self._stream.seek(count * struct.calcsize(f"<{_SCALARS[kind]}"), 1)
        elif kind == _STRING:
            for _ in range(count):
                length = self.scalar("Q")
                if length > _LONGEST_STRING:
                    raise ValueError(f"a string of {length} bytes")
                self._stream.seek(length, 1)
        else:
            raise ValueError("an array of arrays")
        return _Length(count)


def read_gguf(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(key-value pairs, tensor names) of a GGUF file; an array's value is its length. Raises SourceError."""
    try:
        with path.open("rb") as stream:
            reader = _Stream(stream)
            if reader.exactly(4) != b"GGUF":
                raise ValueError("no GGUF magic")
            version = reader.scalar("I")
            if version not in (2, 3):
                raise ValueError(f"GGUF version {version}, expected 2 or 3")
            tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
            if max(tensors, pairs) > _MOST_ENTRIES:
                raise ValueError(f"{tensors} tensors and {pairs} keys")
            keys = {}
            for _ in range(pairs):
                name = reader.string()
                keys[name] = reader.value(reader.scalar("I"))
            names = []
            for _ in range(tensors):
                names.append(reader.string())
                dimensions = reader.scalar("I")
                if dimensions > _MOST_DIMENSIONS:
                    raise ValueError(f"a tensor of {dimensions} dimensions")
                reader.exactly(8 * dimensions + 12)
    except OSError as error:
        raise SourceError(f"{path}: expected a readable GGUF file, found {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{path}: expected a GGUF file, found {error}; fetch the file again") from error
    return keys, names


def gguf_config(path: Path) -> dict[str, Any]:
    """The fields of config.json that the architecture description reads, from a GGUF header.

    Raises SourceError; UnsupportedModel for sizes that differ by layer and for tensors the family does not have.
    """
    keys, names = read_gguf(path)
    kind = keys.get("general.architecture")
    if kind not in _MODEL_TYPES:
        raise UnsupportedModel(f"{path}: GGUF architecture {kind!r}; expected one of {', '.join(_MODEL_TYPES)}")
    config = {field: keys[f"{kind}.{key}"] for field, key in _KEYS.items() if f"{kind}.{key}" in keys}
    uneven = [name for name, value in config.items() if isinstance(value, _Length)]
    if uneven:
        raise UnsupportedModel(f"{path}: {uneven[0]} differs by layer, which is not supported")
    _check_names(path, kind, config.get("num_hidden_layers"), names)
    config["model_type"] = _MODEL_TYPES[kind]
    config["vocab_size"] = keys.get("tokenizer.ggml.tokens", keys.get(f"{kind}.vocab_size"))
    config["tie_word_embeddings"] = "output.weight" not in names
    return config


def _check_names(path: Path, kind: str, layers: object, names: list[str]) -> None:
    """Refuse experts, biases and rotary factors that a conversion would drop, and layers it would invent."""
    if not isinstance(layers, int) or layers > len(names):
        raise UnsupportedModel(f"{path}: {layers} layers in a file of {len(names)} tensors")
    parts = _PER_LAYER + _FURTHER.get(kind, ())
    expected = {f"blk.{layer}.{part}" for layer in range(layers) for part in parts}
    expected |= {"token_embd.weight", "output_norm.weight"}
    missing, odd = expected - set(names), set(names) - expected - {"output.weight"}
    if missing:
        raise UnsupportedModel(f"{path}: the file has no tensor {min(missing)}, which a {kind} model has")
    if odd:
        raise UnsupportedModel(
            f"{path}: the file has {len(odd)} tensors that the description of {kind} does not explain, first "
            f"{min(odd)}; the model would not be treated whole, so it is refused"
        )

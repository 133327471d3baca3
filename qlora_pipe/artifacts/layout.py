"""The exact bytes of safetensors files, known before a weight is touched.

A layout is an ordered mapping from tensor name to TensorSpec. The plan adds up layouts; the writer accepts nothing
that is not in its layout; so planned bytes and written bytes are the same number.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes an element takes, by safetensors dtype code."""

DTYPE_CODE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""safetensors dtype code of a torch dtype's name."""

SHARD_BYTES = 5 * 10**9
"""Tensor bytes after which a new file is begun, the habit of published checkpoints."""

_LONGEST_OFFSET = 10**19

_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class TensorSpec:
    """dtype (safetensors code) and shape of one tensor on disk."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]


Layout = Mapping[str, TensorSpec]


def is_weights(name: str) -> bool:
    """Whether the plan says how large a file of this name is."""
    return ".safetensors" in name or name.endswith(".gguf")


def header(layout: Layout) -> bytes:
    """The file's first bytes: 8-byte little-endian length, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for name, spec in layout.items():
        end = offset + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def entry_bytes(layout: Layout) -> int:
    """Most bytes that the entries of `layout` can take in headers and index, wherever its tensors lie."""
    offsets = [_LONGEST_OFFSET, _LONGEST_OFFSET]
    entries = {name: {"dtype": s.dtype, "shape": list(s.shape), "data_offsets": offsets} for name, s in layout.items()}
    files = dict.fromkeys(layout, f"model-{0:05}-of-{0:05}.safetensors")
    return len(json.dumps(entries, separators=(",", ":"))) + len(json.dumps(files, indent=4))


def file_bytes(layout: Layout) -> int:
    """Exact size in bytes of the safetensors file of `layout`."""
    return len(header(layout)) + sum(spec.nbytes for spec in layout.values())


def shards(layout: Layout, limit: int = SHARD_BYTES, stem: str = "model") -> dict[str, dict[str, TensorSpec]]:
    """Split `layout` over files of at most `limit` tensor bytes (a larger tensor has a file of its own).

    One file is called `<stem>.safetensors`; several `<stem>-00001-of-00003.safetensors`, ...
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in layout.items():
        if groups[-1] and size + spec.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def folder_files(layout: Layout, limit: int = SHARD_BYTES, stem: str = "model") -> dict[str, int]:
    """Bytes of every weight file (and of the index of a sharded set) that a folder with `layout` holds."""
    split = shards(layout, limit, stem)
    files = {name: file_bytes(part) for name, part in split.items()}
    if len(split) > 1:
        files[f"{stem}.safetensors.index.json"] = len(index_json(split))
    return files


def index_json(split: Mapping[str, Layout]) -> bytes:
    """The index file of a sharded checkpoint, as transformers reads it."""
    weight_map = {name: file for file, part in split.items() for name in part}
    total = sum(spec.nbytes for part in split.values() for spec in part.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()

"""The kept-index record: what a pruned model kept of the original, enough to slice and to scatter back.

Indices are original ones, ascending. That order is part of the contract: a sliced weight and a recovered
adapter agree only because both follow it (LoRAM, arXiv 2502.13533, released code).
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from prune.exceptions import IndexMapError, PruneError
from prune.groups import KIND, LayerShape, check_role, group_width

SCHEMA: Final = "qlora_pipe.index_map"
VERSION: Final = 1

_RANGES: Final = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*")


@dataclass(frozen=True)
class LayerKept:
    """Original indices one layer keeps: KV heads and FFN channels, each non-empty, ascending and unique.

    Raises IndexMapError otherwise.
    """

    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, kept in (("kv_heads", self.kv_heads), ("ffn", self.ffn)):
            if not isinstance(kept, tuple) or any(type(index) is not int for index in kept):
                raise IndexMapError(f"{name} must be a tuple of integers, found {type(kept).__name__}")
            if not kept:
                raise IndexMapError(f"{name} keeps nothing; at least one index must stay")
            if kept[0] < 0:
                raise IndexMapError(f"{name} starts with the negative index {kept[0]}")
            for before, after in itertools.pairwise(kept):
                if after <= before:
                    raise IndexMapError(f"{name} must be ascending and unique, found {before} then {after}")


@dataclass(frozen=True)
class IndexMap:
    """Kept indices of every layer beside the original widths of every layer.

    Raises IndexMapError when there is no layer, the two lengths differ, or an index exceeds its layer.
    """

    layers: tuple[LayerKept, ...]
    original: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.original):
            raise IndexMapError(
                f"expected as many kept layers as original layers and at least one, "
                f"found {len(self.layers)} and {len(self.original)}"
            )
        for number, (kept, shape) in enumerate(zip(self.layers, self.original, strict=True)):
            for name, indices, total in (
                ("kv_heads", kept.kv_heads, shape.kv_heads),
                ("ffn", kept.ffn, shape.ffn),
            ):
                if indices[-1] >= total:
                    raise IndexMapError(
                        f"layer {number}: {name} keeps index {indices[-1]}, but the original has {total}"
                    )

    @classmethod
    def identity(cls, shapes: Sequence[LayerShape]) -> Self:
        """The map that keeps everything."""
        kept = (LayerKept(tuple(range(shape.kv_heads)), tuple(range(shape.ffn))) for shape in shapes)
        return cls(tuple(kept), tuple(shapes))

    @property
    def kept_shapes(self) -> tuple[LayerShape, ...]:
        """Widths of all layers of the pruned model."""
        return tuple(self.kept_shape(layer) for layer in range(len(self.layers)))

    def kept_shape(self, layer: int) -> LayerShape:
        """Widths of the pruned layer; head size, hidden size and queries per KV head do not change."""
        kept, shape = self.layers[layer], self.original[layer]
        kv_heads = len(kept.kv_heads)
        return LayerShape(
            hidden=shape.hidden,
            heads=kv_heads * shape.queries_per_kv,
            kv_heads=kv_heads,
            head_dim=shape.head_dim,
            ffn=len(kept.ffn),
        )

    def kept_indices(self, layer: int, role: str) -> Tensor:
        """Kept rows (q, k, v, gate, up) or columns (o, down) of a weight: int64 [kept], ascending, on CPU.

        A kept KV head h brings rows [h * hd, (h + 1) * hd) of k and v, and [h * n * hd, (h + 1) * n * hd)
        of q and of the columns of o, with n query heads per KV head. Raises PruneError for an unknown role.
        Peak bytes: 8 per kept row.
        """
        check_role(role)
        kept, width = self.layers[layer], group_width(role, self.original[layer])
        groups = torch.tensor(kept.kv_heads if KIND[role] == "kv" else kept.ffn, dtype=torch.int64)
        return (groups[:, None] * width + torch.arange(width)).reshape(-1)

    def to_json(self) -> dict[str, Any]:
        """A plain dict for ``json.dump``; indices are written as ascending ranges such as "0-63,70,72-80"."""
        layers = [
            {
                "original": asdict(shape),
                "kv_heads": _format_ranges(kept.kv_heads),
                "ffn": _format_ranges(kept.ffn),
            }
            for kept, shape in zip(self.layers, self.original, strict=True)
        ]
        return {"schema": SCHEMA, "version": VERSION, "layers": layers}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``. Raises IndexMapError naming the fault and its layer."""
        _check_keys(record, ("schema", "version", "layers"), "index map")
        if record["schema"] != SCHEMA:
            raise IndexMapError(f"expected the schema {SCHEMA!r}, found {record['schema']!r}")
        if record["version"] != VERSION:
            raise IndexMapError(f"this release reads version {VERSION}, found {record['version']!r}")
        if not isinstance(record["layers"], list):
            raise IndexMapError(f"layers must be a list, found {type(record['layers']).__name__}")
        pairs = []
        for number, entry in enumerate(record["layers"]):
            try:
                pairs.append(_read_layer(entry))
            except PruneError as error:
                raise IndexMapError(f"layer {number}: {error}") from None
        return cls(tuple(kept for kept, _ in pairs), tuple(shape for _, shape in pairs))

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: sorted keys, no spaces."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def _read_layer(entry: Mapping[str, Any]) -> tuple[LayerKept, LayerShape]:
    _check_keys(entry, ("original", "kv_heads", "ffn"), "entry")
    _check_keys(entry["original"], ("hidden", "heads", "kv_heads", "head_dim", "ffn"), "original")
    shape = LayerShape(**entry["original"])
    kept = LayerKept(_parse_ranges(entry["kv_heads"], shape.kv_heads), _parse_ranges(entry["ffn"], shape.ffn))
    return kept, shape


def _check_keys(record: Mapping[str, Any], expected: tuple[str, ...], what: str) -> None:
    if not isinstance(record, Mapping):
        raise IndexMapError(f"{what} must be a mapping, found {type(record).__name__}")
    if set(record) != set(expected):
        raise IndexMapError(f"{what} must have the keys {list(expected)}, found {list(record)}")


def _format_ranges(indices: tuple[int, ...]) -> str:
    parts, start = [], 0
    for position in range(1, len(indices) + 1):
        if position == len(indices) or indices[position] != indices[position - 1] + 1:
            first, last = indices[start], indices[position - 1]
            parts.append(str(first) if first == last else f"{first}-{last}")
            start = position
    return ",".join(parts)


def _parse_ranges(text: object, total: int) -> tuple[int, ...]:
    if not isinstance(text, str) or not _RANGES.fullmatch(text):
        raise IndexMapError(f"expected ascending ranges such as '0-63,70,72-80', found {text!r}")
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        start, stop = int(first), int(last or first)
        # Checked before expanding, so that a damaged file cannot ask for a billion indices.
        if not start <= stop < total:
            raise IndexMapError(f"the range {part!r} is not within 0-{total - 1}")
        if indices and start <= indices[-1]:
            raise IndexMapError(f"ranges must be ascending and disjoint, found {part!r} after {indices[-1]}")
        indices.extend(range(start, stop + 1))
    return tuple(indices)

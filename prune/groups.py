"""Coupled structures of a decoder layer: which rows and columns must leave together.

Two kinds of group exist. A ``"kv"`` group is one key/value head with all query heads that read it: its rows
in q, k, v and its columns in o. An ``"ffn"`` group is one channel: its row in gate and up and its column in
down. The hidden size, norms, embeddings and output head are never pruned, so the residual stream keeps its
basis.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from prune.exceptions import PruneError

ROLES: Final = ("q", "k", "v", "o", "gate", "up", "down")

PRUNED_AXIS: Final[Mapping[str, str]] = {
    "q": "rows",
    "k": "rows",
    "v": "rows",
    "o": "columns",
    "gate": "rows",
    "up": "rows",
    "down": "columns",
}

KIND: Final[Mapping[str, str]] = {
    "q": "kv",
    "k": "kv",
    "v": "kv",
    "o": "kv",
    "gate": "ffn",
    "up": "ffn",
    "down": "ffn",
}


@dataclass(frozen=True)
class LayerShape:
    """Widths of one decoder layer; ``heads * head_dim`` need not equal ``hidden``.

    Raises PruneError when a width is not a positive integer or ``heads`` is not a multiple of ``kv_heads``.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise PruneError(f"{field.name} must be a positive integer, found {value!r}")
        if self.heads % self.kv_heads:
            raise PruneError(f"heads must be a multiple of kv_heads, found {self.heads} and {self.kv_heads}")

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one key/value head (n_rep): 1 for MHA, ``heads`` for MQA."""
        return self.heads // self.kv_heads

    def group_count(self, kind: str) -> int:
        """Number of groups of ``kind`` ("kv" or "ffn") in this layer."""
        return self.kv_heads if kind == "kv" else self.ffn


def shape_of(role: str, shape: LayerShape) -> tuple[int, int]:
    """(out, in) of the weight that plays ``role`` in a layer of this shape.

    Raises PruneError for an unknown role.
    """
    pruned = group_width(role, shape) * shape.group_count(KIND[role])
    return (pruned, shape.hidden) if PRUNED_AXIS[role] == "rows" else (shape.hidden, pruned)


def group_width(role: str, shape: LayerShape) -> int:
    """Consecutive rows (or columns) of ``role`` that belong to one group.

    Query rows are ordered [kv head][query head of it][head_dim], so a KV head owns
    ``queries_per_kv * head_dim`` consecutive rows of q and as many columns of o. Raises PruneError for an
    unknown role.
    """
    check_role(role)
    if KIND[role] == "ffn":
        return 1
    return shape.head_dim if role in ("k", "v") else shape.queries_per_kv * shape.head_dim


def pruned_dim(role: str) -> int:
    """Tensor dimension of the weight [out, in] along which ``role`` is pruned: 0 for rows, 1 for columns.

    Raises PruneError for an unknown role.
    """
    check_role(role)
    return 0 if PRUNED_AXIS[role] == "rows" else 1


def check_role(role: str) -> None:
    """Raise PruneError unless ``role`` is one of ``ROLES``."""
    if role not in ROLES:
        raise PruneError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")

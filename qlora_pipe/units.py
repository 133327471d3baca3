"""Sizes as users write them: `24GB`, `900MiB`, `2.75bits`."""

import re
from decimal import Decimal
from typing import Literal, NamedTuple

from qlora_pipe.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*$")


class Budget(NamedTuple):
    """A memory budget.

    `bits`: total bits per weight of the block linears, scales and low-rank factors counted.
    `bytes`: bytes of the whole decomposed model on disk, embeddings, norms and file headers counted.
    """

    kind: Literal["bits", "bytes"]
    value: float


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `24GB` (10^9) or `24GiB` (2^30); raises ConfigError."""
    match = _SIZE.match(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(
            f"expected a size such as 24GB or 900MiB, found {text!r}; give a number followed by one of "
            "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    return int(Decimal(match[1]) * _UNITS[match[2].upper()])


def parse_budget(text: str) -> Budget:
    """A Budget from `2.75bits` or a size in bytes; raises ConfigError."""
    match = _SIZE.match(text)
    if match is not None and match[2].lower() in ("bits", "bit"):
        if not 0 < float(match[1]) <= 32:
            raise ConfigError(f"expected a budget between 0 and 32 bits per weight, found {text!r}")
        return Budget("bits", float(match[1]))
    try:
        return Budget("bytes", parse_bytes(text))
    except ConfigError as error:
        raise ConfigError(f"expected a budget such as 2.75bits or 24GB, found {text!r}") from error


def format_bytes(count: float) -> str:
    """`count` bytes for people, in powers of ten."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"

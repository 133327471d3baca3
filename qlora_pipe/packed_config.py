"""`quantization_config` of a packed model folder, written and read here alone. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_pipe.errors import SourceError
from quant.exceptions import QuantError
from quant.storage import Choice

METHOD = "qlora_pipe"
"""`quant_method`, by which transformers finds the quantizer."""

VERSION = 1
"""Of the layout of this dictionary and of the tensors it speaks of."""

SIDED = 2
"""The version where modules have other sides than config.json implies; written only there, so that what an older
release can read it does read."""


@dataclass(frozen=True)
class Packing:
    """How one linear map or embedding is stored; its `sides`, (out, in), where config.json implies others."""

    choice: Choice
    transposed: bool
    sides: tuple[int, int] | None = None


def to_json(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """`quantization_config` for `packings` by module name. Formats are listed once, modules point to them."""
    stored = {name: replace(packing, sides=None) for name, packing in packings.items()}
    sides = {name: list(packing.sides) for name, packing in packings.items() if packing.sides is not None}
    formats = list(dict.fromkeys(stored.values()))
    body = {
        "quant_method": METHOD,
        "version": SIDED if sides else VERSION,
        "formats": [packing.choice.to_json() | {"transposed": packing.transposed} for packing in formats],
        "modules": {name: formats.index(packing) for name, packing in stored.items()},
    }
    return body | {"sides": sides} if sides else body


def from_json(body: Mapping[str, Any]) -> dict[str, Packing]:
    """Inverse of `to_json`; raises SourceError for anything it would not write."""
    where = "quantization_config of a packed folder"
    version = body.get("version")
    if version not in (VERSION, SIDED):
        raise SourceError(
            f"{where}: expected version {VERSION} or {SIDED}, found {version!r}; "
            "load it with the release of qlora-pipe that wrote it, or decompose again"
        )
    try:
        formats = [Packing(Choice.from_json(row), _flag(row["transposed"])) for row in body["formats"]]
        modules = {str(name): _index(index) for name, index in body["modules"].items()}
        found = {name: formats[index] for name, index in modules.items()}
        if (version == SIDED) != bool(body.get("sides")):
            raise ValueError(f"sides {body.get('sides')!r} in version {version}; version {SIDED} has some, no other")
        for name, value in (body.get("sides") or {}).items():
            found[name] = replace(found[name], sides=_sides(value))
        return found
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, QuantError) as error:
        raise SourceError(
            f"{where}: expected formats, modules that name them, and sides of these, found {error!r}"
        ) from error


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"transposed must be true or false, not {value!r}")
    return value


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a module must point to a format by its number, not {value!r}")
    return value


def _sides(value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or [type(side) for side in value] != [int, int] or min(value) < 1:
        raise TypeError(f"sides must be [out, in], both above 0, not {value!r}")
    return value[0], value[1]

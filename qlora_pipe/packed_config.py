"""`quantization_config` of a model folder that is packed, or has sides of its own, written and read here alone. Needs
no torch."""

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
"""The version where packed modules have other sides than config.json implies; written only there, so that what an older
release can read it does read."""

RESHAPED = 3
"""The version where linear maps that are not packed do, and packed ones may; or where maps have biases of their own."""


@dataclass(frozen=True)
class Packing:
    """How one linear map or embedding is stored, without a choice dense; its `sides`, (out, in), where config.json
    implies others, and whether it has a `bias` where config.json implies none."""

    choice: Choice | None = None
    transposed: bool = False
    sides: tuple[int, int] | None = None
    bias: bool = False


def to_json(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """`quantization_config` for `packings` by module name. Formats are listed once, modules point to them."""
    stored = {name: (each.choice, each.transposed) for name, each in packings.items() if each.choice is not None}
    sides = {name: list(packing.sides) for name, packing in packings.items() if packing.sides is not None}
    biases = [name for name, packing in packings.items() if packing.bias]
    formats = list(dict.fromkeys(stored.values()))
    reshaped = biases or not sides.keys() <= stored.keys()
    body = {
        "quant_method": METHOD,
        "version": RESHAPED if reshaped else SIDED if sides else VERSION,
        "formats": [choice.to_json() | {"transposed": transposed} for choice, transposed in formats],
        "modules": {name: formats.index(each) for name, each in stored.items()},
    }
    return body | ({"sides": sides} if sides else {}) | ({"biases": biases} if biases else {})


def from_json(body: Mapping[str, Any]) -> dict[str, Packing]:
    """Inverse of `to_json`; raises SourceError for anything it would not write."""
    where = "quantization_config of a packed folder"
    version = body.get("version")
    if version not in (VERSION, SIDED, RESHAPED):
        raise SourceError(
            f"{where}: expected version {VERSION}, {SIDED} or {RESHAPED}, found {version!r}; "
            "load it with the release of qlora-pipe that wrote it, or decompose again"
        )
    try:
        formats = [Packing(Choice.from_json(row), _flag(row["transposed"])) for row in body["formats"]]
        modules = {str(name): _index(index) for name, index in body["modules"].items()}
        found = {name: formats[index] for name, index in modules.items()}
        for name, value in (body.get("sides") or {}).items():
            found[name] = replace(found.get(name, Packing()), sides=_sides(value))
        for name in map(str, body.get("biases") or []):
            found[name] = replace(found.get(name, Packing()), bias=True)
        expected = to_json(found)["version"]
        if version != expected:
            raise ValueError(
                f"sides {body.get('sides')!r} and biases {body.get('biases')!r} in version {version}, which belong to "
                f"{expected}"
            )
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

"""`quantization_config` of a packed model folder, written and read here alone. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_pipe.errors import SourceError
from quant.exceptions import QuantError
from quant.storage import Choice

METHOD = "qlora_pipe"
"""`quant_method`, by which transformers finds the quantizer."""

VERSION = 1
"""Of the layout of this dictionary and of the tensors it speaks of."""


@dataclass(frozen=True)
class Packing:
    """How one linear map or embedding is stored, shape apart."""

    choice: Choice
    transposed: bool


def to_json(packings: Mapping[str, Packing]) -> dict[str, Any]:
    """`quantization_config` for `packings` by module name. Formats are listed once, modules point to them."""
    formats = list(dict.fromkeys(packings.values()))
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "formats": [packing.choice.to_json() | {"transposed": packing.transposed} for packing in formats],
        "modules": {name: formats.index(packing) for name, packing in packings.items()},
    }


def from_json(body: Mapping[str, Any]) -> dict[str, Packing]:
    """Inverse of `to_json`; raises SourceError for anything it would not write."""
    where = "quantization_config of a packed folder"
    if body.get("version") != VERSION:
        raise SourceError(
            f"{where}: expected version {VERSION}, found {body.get('version')!r}; "
            "load it with the release of qlora-pipe that wrote it, or decompose again"
        )
    try:
        formats = [Packing(Choice.from_json(row), _flag(row["transposed"])) for row in body["formats"]]
        modules = {str(name): _index(index) for name, index in body["modules"].items()}
        return {name: formats[index] for name, index in modules.items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, QuantError) as error:
        raise SourceError(f"{where}: expected formats, and modules that name them, found {error!r}") from error


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"transposed must be true or false, not {value!r}")
    return value


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"a module must point to a format by its number, not {value!r}")
    return value

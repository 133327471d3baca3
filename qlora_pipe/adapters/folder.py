"""PEFT's LoRA folders of anybody: what adapter_config.json means, checked against the tensors, before one is read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_pipe.artifacts.headers import Location
from qlora_pipe.artifacts.manifest import file_digest
from qlora_pipe.artifacts.tensors import TensorReader, torch_dtype_of
from qlora_pipe.errors import SourceError, UnsupportedModel, WeightError
from qlora_pipe.exporters.peft import STEM
from qlora_pipe.sources import read_object

CONFIG = "adapter_config.json"

_FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<side>[AB])\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")

# Settings that say where the adapter is, how it was trained or how it is computed. Any other that is set changes what
# it computes, as far as can be known one of a later PEFT too.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip

# The inits that leave the base as it was; the others take a part out of it and put it into the adapter.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class Site:
    """The adapter of one linear map, y + strength * B (A x): A [rank, in] and B [out, rank] in the safetensors dtypes
    `dtypes`."""

    rank: int
    strength: float
    sides: tuple[int, int]
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class Adapter:
    """A LoRA folder whose settings and tensors agree; factors are read when they are asked for."""

    reader: TensorReader
    config: Mapping[str, Any]
    sites: Mapping[str, Site]

    @property
    def folder(self) -> Path:
        return self.reader.folder

    @property
    def base(self) -> str | None:
        """What its settings call the model it was trained on."""
        return self.config.get("base_model_name_or_path")

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of one linear map as stored; raises WeightError for NaN or infinity."""
        dtypes = map(torch_dtype_of, self.sites[name].dtypes)
        lora_a, lora_b = (
            self.reader.read_float(stored(name, side), dtype) for side, dtype in zip("AB", dtypes, strict=True)
        )
        return lora_a, lora_b

    def update(self, name: str) -> tuple[Tensor, Tensor]:
        """What it adds to one weight, float64 factors [out, rank] and [rank, in], the strength in the first."""
        lora_a, lora_b = self.factors(name)
        return lora_b.double() * self.sites[name].strength, lora_a.double()

    def identity(self) -> dict[str, str]:
        """SHA-256 of its files."""
        files = {place.file for place in self.reader.locations.values()} | {self.folder / CONFIG}
        return {file.name: file_digest(file) for file in sorted(files)}


def stored(name: str, side: str) -> str:
    """The name of factor `side`, A or B, of a linear map in the file."""
    return f"base_model.model.{name}.lora_{side}.weight"


def read_adapter(folder: Path, *, decomposed: bool = False) -> Adapter:
    """Read settings and headers, no factor. `decomposed`: an init that changed the base (PiSSA, OLoRA, CorDA, LoftQ,
    LoRA-GA) will do.

    Raises SourceError for a folder that is not whole, UnsupportedModel for what is not plain LoRA on linear maps, and
    WeightError for factors that do not belong together or to the settings.
    """
    config = read_object(folder / CONFIG, "a PEFT adapter")
    _check_kind(folder, config, decomposed)
    reader = TensorReader(folder, STEM)
    return Adapter(reader, config, _sites(folder, config, reader.locations))


def _check_kind(folder: Path, config: Mapping[str, Any], decomposed: bool) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"{folder}: expected an adapter of peft_type LORA, found {config.get('peft_type')!r}; PEFT's "
            "convert_to_lora makes one of most others"
        )
    changing = [name for name, value in config.items() if name not in _HARMLESS and value and value != "none"]
    if changing:
        raise UnsupportedModel(
            f"{folder}: expected plain LoRA, found {', '.join(sorted(changing))} set, with which it is more than "
            "strength x B A; merge it into its model with PEFT, or train one without"
        )
    init = config.get("init_lora_weights", True)
    if not decomposed and init not in _PLAIN_INITS:
        raise UnsupportedModel(
            f"{folder}: expected an adapter of the model as it was, found one with init_lora_weights {init!r}, which "
            "moved a part of the model into the adapter; take that out with `qlora-pipe adapter subtract`, given the "
            "adapter as it was saved before training"
        )


def _sites(folder: Path, config: Mapping[str, Any], locations: Mapping[str, Location]) -> dict[str, Site]:
    found: dict[str, dict[str, Location]] = {}
    for tensor, place in locations.items():
        match = _FACTOR.fullmatch(tensor)
        if match is None or len(place.spec.shape) != 2:
            raise UnsupportedModel(
                f"{folder}: expected factors lora_A and lora_B of linear maps alone, found {tensor} "
                f"{list(place.spec.shape)}; leave that module out of target_modules, or merge the adapter with PEFT"
            )
        found.setdefault(match["name"], {})[match["side"]] = place
    if not found:
        raise SourceError(f"{folder}: expected LoRA factors, found no tensor; save the adapter again")
    return {name: _site(folder, config, name, sides) for name, sides in found.items()}


def _site(folder: Path, config: Mapping[str, Any], name: str, sides: Mapping[str, Location]) -> Site:
    if len(sides) != 2:
        raise WeightError(f"{folder}: {name} has lora_{''.join(sides)} alone; save the adapter again")
    one, two = sides["A"].spec, sides["B"].spec
    dtypes = (one.dtype, two.dtype)
    if one.shape[0] != two.shape[1] or not min(*one.shape, *two.shape):
        raise WeightError(
            f"{folder}: expected factors [rank, in] and [out, rank] of {name}, found {list(one.shape)} and "
            f"{list(two.shape)}; save the adapter again"
        )
    if not set(dtypes) <= set(_FLOATS):
        raise WeightError(f"{folder}: expected floating factors of {name}, found {' and '.join(dtypes)}; save them so")
    rank = _setting(folder, config, name, "rank_pattern", "r")
    if rank != one.shape[0]:
        raise WeightError(
            f"{folder}: {CONFIG} gives {name} rank {rank:g}, its factors have rank {one.shape[0]}; correct r or "
            "rank_pattern, or save the adapter again"
        )
    alpha = _setting(folder, config, name, "alpha_pattern", "lora_alpha")
    strength = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Site(one.shape[0], strength, (two.shape[0], one.shape[1]), dtypes)


def _setting(folder: Path, config: Mapping[str, Any], name: str, patterns: str, common: str) -> float:
    """A number for one linear map: that of the first pattern which matches the end of its name, as PEFT reads them."""
    try:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                return _number(value)
        return _number(config[common])
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise SourceError(
            f"{folder / CONFIG}: expected numbers as {common} and in {patterns}, found {error!r}; save it again"
        ) from error


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return value

"""Checking exported integers: read as their readers are told to, they are those that were trained, one by one."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from gguf import GGUFReader

from prune.groups import ROLES, shape_of
from prune.indexmap import IndexMap
from qlora_pipe.architectures import Architecture, from_config, linear_name
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config_export import IntegerFormat
from qlora_pipe.config_training import Compact
from qlora_pipe.errors import ArtifactError
from qlora_pipe.exporters.gguf import linear_blocks
from qlora_pipe.exporters.gptq import ZERO_SHIFT
from qlora_pipe.gguf_layout import FILE, gguf_name
from qlora_pipe.rules import bits_of
from qlora_pipe.sources import BASE_LINK, read_config
from quant.interchange import stream_codes
from quant.pack import unpack

_AGAIN = "run the stage again"


def check_exported(run: Path, kept: IndexMap) -> None:
    """Every exported format of the integer model holds the codes and steps of compact.

    Raises ArtifactError, or KeyError, TypeError or ValueError where something is malformed. Peak bytes: 16 for each
    weight of a map.
    """
    sides = {
        linear_name(layer, role): shape_of(role, kept.kept_shape(layer))
        for layer in range(len(kept.layers))
        for role in ROLES
    }
    for name in get_args(IntegerFormat):
        folder = run / "export" / name
        if not folder.is_dir():
            continue
        trained = TensorReader(run / "compact")
        if name == "gguf":
            problem = _gguf_problem(run, folder / FILE, trained, kept)
        else:
            settings = json.loads((folder / "config.json").read_text())["quantization_config"]
            bits, exported = told_bits(settings, sides), TensorReader(folder)
            found = (difference(exported, trained, name, linear, size, bits[linear]) for linear, size in sides.items())
            problem = next(filter(None, found), None)
        if problem is not None:
            raise ArtifactError(f"{folder}: {problem} are not those of compact; {_AGAIN}")


def _gguf_problem(run: Path, path: Path, trained: TensorReader, kept: IndexMap) -> str | None:
    made = read_manifest(run / "compact").settings
    settings = Compact.model_validate({key: value for key, value in made.items() if key in Compact.model_fields})
    small = from_config(read_config(run / BASE_LINK)).with_layers(kept.kept_shapes)
    bits = bits_of([name for _, _, name in small.linears()], settings.bits, settings.rules)
    return gguf_difference(gguf_stored(path), trained, small, bits, settings)


def gguf_stored(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a GGUF file, as bytes of blocks, by name; not yet in memory."""
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


def gguf_difference(
    stored: Mapping[str, np.ndarray],
    trained: TensorReader,
    small: Architecture,
    bits: Mapping[str, int],
    settings: Compact,
) -> str | None:
    """What `difference` says of a map, of all maps of a GGUF file, block by block. Peak bytes: 9 for each weight of a
    map."""
    for name, width in bits.items():
        blocks, _ = linear_blocks(trained.read, name, small, width, settings)
        if not np.array_equal(stored[gguf_name(f"{name}.weight")], blocks.numpy()):
            return f"codes or steps of {name}"
    return None


def told_bits(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
    """Code width of every linear map, as the `quantization_config` of a folder has it."""
    if settings["quant_method"] == "gptq":
        own = {pattern.removeprefix("+:"): rule["bits"] for pattern, rule in settings.get("dynamic", {}).items()}
        return {
            name: next((bits for pattern, bits in own.items() if re.fullmatch(pattern, name)), settings["bits"])
            for name in names
        }
    found: dict[str, int] = {}
    for group in settings["config_groups"].values():
        targets = names if group["targets"] == ["Linear"] else group["targets"]
        found |= dict.fromkeys(targets, group["weights"]["num_bits"])
    return found


def difference(
    exported: TensorReader, trained: TensorReader, kind: str, name: str, sides: tuple[int, int], bits: int
) -> str | None:
    """What of a linear map [out, in] is stored in the format `kind` as other than was `trained`; None if nothing.

    Steps may be rounded to the dtype they are stored in. Peak bytes: 16 for each weight.
    """
    (rows, columns), scale = sides, trained.read(f"{name}.scale")
    if kind == "compressed-tensors":
        stored, steps = exported.read(f"{name}.weight_packed"), exported.read(f"{name}.weight_scale")
    else:
        stored, steps = exported.read(f"{name}.qweight").T, exported.read(f"{name}.scales").T
        zeros = stream_codes(exported.read(f"{name}.qzeros"), bits, rows) + ZERO_SHIFT[kind]
        if not bool((zeros == 2 ** (bits - 1)).all()):
            return f"zero points of {name}"
        in_turn = torch.arange(columns, dtype=torch.int32) // (columns // scale.shape[1])
        if not torch.equal(exported.read(f"{name}.g_idx"), in_turn):
            return f"groups of {name}"
    if not torch.equal(stream_codes(stored, bits, columns), unpack(trained.read(f"{name}.codes"), bits, columns)):
        return f"codes of {name}"
    return None if torch.equal(steps, scale.to(steps.dtype)) else f"steps of {name}"

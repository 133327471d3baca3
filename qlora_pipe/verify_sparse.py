"""Checking a run in which single entries went: masks are what was asked for, and Q is zero where they say."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune.groups import PRUNED_AXIS, ROLES, shape_of
from prune.indexmap import IndexMap
from prune.sparse import check_mask, unpack_mask
from qlora_pipe.allocation import read_allocation
from qlora_pipe.architectures import linear_name
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.config_sparsity import Sparsity
from qlora_pipe.errors import ArtifactError
from quant.masked import zero_entries
from quant.storage import PackedShape

_AGAIN = "run the stage again"


def check_masks(folder: Path, body: Mapping[str, Any], kept: IndexMap) -> None:
    """Nothing is cut, every mask keeps to the pattern, and what selection.json counts is what masks hold.

    Raises ArtifactError, or PruneError, KeyError, TypeError or ValueError where something is malformed.
    """
    path, settings = folder / "selection.json", Sparsity.model_validate(body["sparsity"])
    if kept != IndexMap.identity(kept.original):
        raise ArtifactError(f"{folder / 'kept.json'}: it cuts groups, where single entries go; {_AGAIN}")
    reader, found = TensorReader(folder, "masks"), {}
    for name, _, _, (_, columns) in linear_maps(kept):
        mask = unpack_mask(reader.read(f"{name}.mask"), columns)
        check_mask(mask, settings.ratio, settings.group)
        weights, zeros = mask.numel(), int(mask.sum())
        found[name] = {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}
    for name, row in found.items():
        if body["matrices"].get(name) != row:
            raise ArtifactError(f"{path}: {name}: its mask has {row}, found {body['matrices'].get(name)}; {_AGAIN}")
    gone = sum(row["zeros"] for row in found.values())
    share, left = gone / sum(row["weights"] for row in found.values()), body["parameters"]["model"] - gone
    if (body["true_sparsity"], body["parameters"]["nonzero"]) != (share, left):
        raise ArtifactError(f"{path}: masks leave {left} parameters, a share of {share} goes, found others; {_AGAIN}")


def check_zeros(run: Path, kept: IndexMap, allocated: Mapping[str, Any]) -> None:
    """Every masked entry of Q has the code for zero, and every tensor but the codes is the full model's.

    `allocated`: the body of allocation.json. Raises as `check_masks`."""
    allocation = read_allocation(allocated)
    full = "decompose" if (run / "refine" / "skipped.json").exists() else "refine"
    masks, small, whole = TensorReader(run / "select", "masks"), TensorReader(run / "prune"), TensorReader(run / full)
    for name, _, role, (rows, columns) in linear_maps(kept):
        transposed, bias = PRUNED_AXIS[role] == "columns", f"{name}.bias" in small
        shape = PackedShape(columns, rows, allocation[name], transposed, bias)
        buffers: dict[str, Tensor] = {}
        for buffer in shape.buffers():
            buffers[buffer] = small.read(f"{name}.{buffer}")
            if buffer != "codes" and not torch.equal(buffers[buffer], whole.read(f"{name}.{buffer}")):
                raise ArtifactError(f"{run / 'prune'}: {name}.{buffer} is not that of {full}; {_AGAIN}")
        mask = unpack_mask(masks.read(f"{name}.mask"), columns)
        filled = int((mask & ~zero_entries(buffers, shape)).sum())
        if filled:
            raise ArtifactError(
                f"{run / 'prune'}: {name}.codes: expected zeros at the {int(mask.sum())} masked entries, found "
                f"{filled} others; {_AGAIN}"
            )


def linear_maps(kept: IndexMap) -> Iterator[tuple[str, int, str, tuple[int, int]]]:
    """(name, layer, role, sides (out, in) before pruning) of every linear map."""
    for layer, shape in enumerate(kept.original):
        for role in ROLES:
            yield linear_name(layer, role), layer, role, shape_of(role, shape)

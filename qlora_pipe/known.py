"""What is known before a stage runs, and the exact weight files it will write; needs no torch."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from prune.groups import PRUNED_AXIS, LayerShape, shape_of
from qlora_pipe import layouts
from qlora_pipe.architectures import Architecture, linear_name
from qlora_pipe.artifacts.layout import DTYPE_BYTES, SHARD_BYTES, entry_bytes, folder_files
from qlora_pipe.config import Config
from qlora_pipe.config_export import IntegerFormat
from qlora_pipe.errors import ConfigError
from qlora_pipe.gguf_layout import FILE, gguf_bytes, gguf_keys, gguf_tensors
from qlora_pipe.gguf_tokens import Keys
from qlora_pipe.integer_formats import chosen
from qlora_pipe.reading import read_by
from qlora_pipe.rules import Narrowed, bits_of, narrow
from qlora_pipe.units import parse_budget
from qlora_pipe.widths import small_architecture, with_biases
from quant.exceptions import ShapeError
from quant.storage import Choice, PackedShape

CHAIN = (
    "source",
    "calibrate",
    "score",
    "allocate",
    "decompose",
    "refine",
    "select",
    "prune",
    "align",
    "train",
    "compact",
    "recover",
    "export",
    "evaluate",
)
"""The stages in order."""

_OFFSET_DIGITS = 20

PEFT_ADAPTER = "peft/adapter_model"
"""Like every adapter of PEFT, which reads a single file, never split."""

Allocation = Mapping[str, Choice]


@dataclass(frozen=True)
class Known:
    """Configuration and headers; the allocation once it is solved (`allocation_is_final`), before that an estimate;
    the layers that pruning leaves once they are selected (`kept`).

    `converts`: the model is a GGUF file, which becomes a folder of fp32 safetensors first. `folder`: where the model
    lies as a folder; without one the plan has no tokenizer to count in an exported GGUF."""

    config: Config
    architecture: Architecture
    dtypes: Mapping[str, str]
    allocation: Allocation
    allocation_is_final: bool
    converts: bool = False
    kept: tuple[LayerShape, ...] | None = None
    folder: Path | None = None

    @cached_property
    def small(self) -> Architecture:
        """The architecture after pruning: exact where `is_final`, else a guess at widths that scores decide."""
        layers = self.kept or small_architecture(self.architecture, self.config.prune).layers
        return with_biases(self.architecture.with_layers(layers), self.config.prune)

    @property
    def is_final(self) -> bool:
        """Whether every shape is known, and so the bytes of every file."""
        return self.allocation_is_final and (self.kept is not None or self.config.prune.widths == "uniform")

    @property
    def small_allocation(self) -> Allocation:
        """What pruning makes of the allocation: where rows are gone, superblocks across rows are."""
        if self.config.prune.sparsity.enabled:
            return self.allocation
        return {name: choice.sliced() for name, choice in self.allocation.items()}

    def with_allocation(self, allocation: Allocation) -> "Known":
        return replace(self, allocation=allocation, allocation_is_final=True)

    def with_kept(self, layers: Sequence[LayerShape]) -> "Known":
        """The same once it is selected what stays of each layer."""
        return replace(self, kept=tuple(layers))

    def moments(self) -> layouts.Tensors:
        return layouts.moments(self.architecture, self.config.calibrate)

    def decomposed(self) -> layouts.Tensors:
        return layouts.decomposed(self.architecture, self.dtypes, self.allocation, self.config.decompose.embeddings)

    def pruned(self) -> layouts.Tensors:
        return layouts.decomposed(self.small, self.dtypes, self.small_allocation, self.config.decompose.embeddings)

    def outer(self) -> layouts.Tensors:
        """What the decomposed and the pruned model have beside linear maps."""
        return layouts.outer(self.architecture, self.dtypes, self.config.decompose.embeddings)

    def tables(self) -> dict[str, PackedShape]:
        """How these store embedding and head, by module name; none if they are kept."""
        return layouts.tables(self.architecture, self.config.decompose.embeddings)

    @property
    def full_packed(self) -> str:
        """The stage whose artifact is the full decomposed model."""
        return "refine" if self.config.refine.enabled else "decompose"

    def packed_shape(self, stage: str, layer: int, role: str) -> PackedShape:
        """How decompose, refine or prune stores one linear map."""
        architecture, allocation = {
            "decompose": (self.architecture, self.allocation),
            "refine": (self.architecture, self.allocation),
            "prune": (self.small, self.small_allocation),
        }[stage]
        return layouts.packed_shape(architecture, layer, role, allocation[linear_name(layer, role)])

    @cached_property
    def integer_bits(self) -> dict[str, int]:
        """Code width of every linear map of the integer model."""
        names = [name for _, _, name in self.architecture.linears()]
        return bits_of(names, self.config.compact.bits, self.config.compact.rules)

    def integers(self) -> layouts.Tensors:
        return layouts.integers(self.small, self.dtypes, self.config.compact, self.integer_bits)

    @cached_property
    def integer_formats(self) -> dict[IntegerFormat, str | None]:
        """Formats of other tools for the integer model: None for one that is written, else why it is left out."""
        return chosen(self.architecture, self.small, self.config, self.integer_bits)

    def exported_integers(self, name: IntegerFormat) -> layouts.Tensors:
        """The integer model in a format of other tools."""
        layout = {"compressed-tensors": layouts.compressed_tensors, "gguf": gguf_tensors}.get(name, layouts.gptq)
        return layout(self.small, self.config.export.dtype, self.config.compact, self.integer_bits)

    @cached_property
    def gguf_keys(self) -> Keys:
        """What an exported GGUF says beside its tensors; raises ConfigError, SourceError."""
        if self.folder is None:
            return {}
        return gguf_keys(self.folder, self.small, self.config.compact, self.integer_bits)

    def compensation(self) -> layouts.Tensors:
        """Slot C."""
        return layouts.adapter(self.small, self.config.align.rank)

    def adapter(self) -> layouts.Tensors:
        return layouts.adapter(self.small, self.task_rank())

    def full_adapter(self) -> layouts.Tensors:
        return layouts.adapter(self.architecture, self.task_rank())

    def task_rank(self) -> layouts.Rank:
        """Of slot T. What a low-rank part trained in place has moved by is a product of twice its rank."""
        if self.config.train.low_rank == "frozen":
            return self.config.train.rank
        return {name: 2 * choice.rank for name, choice in self.allocation.items()}

    def full_compact_adapter(self) -> layouts.Tensors:
        return layouts.adapter(self.architecture, self.compact_rank())

    def compact_rank(self) -> int:
        """Of what compact trains; factors that go on from what was trained before, slots C and T, have their rank."""
        if not self.config.compact.goes_on:
            return 0 if self.config.compact.method == "lsq" else self.config.compact.rank
        return self.config.train.rank + (self.config.align.rank if self.config.compensates else 0)

    def compact_adapter(self) -> layouts.Tensors:
        return layouts.adapter(self.small, self.compact_rank())

    def outputs(self, stage: str) -> dict[str, layouts.Tensors]:
        """Layout of every set of weights a stage writes, by path in its artifact without the ending."""
        config = self.config
        if stage == "calibrate":
            return {"moments": self.moments()}
        if stage == "decompose" or (stage == "refine" and config.refine.enabled):
            return {"model": self.decomposed()}
        if stage == "select" and config.prune.method == "lora":
            return {"adapter": layouts.adapter(self.architecture, config.align.rank)}
        if stage == "select" and config.prune.sparsity.enabled:
            return {"masks": layouts.masks(self.architecture)}
        if stage == "prune":
            return {"model": self.pruned()}
        if stage == "align" and config.compensates:
            return {"adapter": self.compensation()}
        if stage == "train":
            return {"adapter": self.adapter()}
        if stage == "compact" and config.compact.enabled:
            adapter = {"adapter": self.compact_adapter()} if config.compact.leaves_adapter else {}
            return {"model": self.integers()} | adapter
        if stage == "recover":
            compact = {"compact_adapter": self.full_compact_adapter()} if config.compact_transfers else {}
            return {"adapter": self.full_adapter()} | compact
        if stage == "export":
            wanted = {
                PEFT_ADAPTER: config.export.peft and layouts.peft_adapter(self.architecture, self.task_rank()),
                "merged/model": config.export.merged and layouts.dense(self.architecture, config.export.dtype),
                "small/model": config.export.small and layouts.dense(self.small, config.export.dtype),
            }
            formats = [name for name, reason in self.integer_formats.items() if reason is None]
            integers = {f"{name}/model": self.exported_integers(name) for name in formats}
            if config.export.packed:
                given = (self.architecture, self.allocation)
                wanted["bitsandbytes/model"] = layouts.bitsandbytes(given[0], config.export.dtype, given[1])
                wanted["bitsandbytes/adapter/adapter_model"] = layouts.bitsandbytes_adapter(*given)
            return {path: layout for path, layout in wanted.items() if layout} | integers
        return {}

    def files(self, stage: str) -> dict[str, int]:
        """Name to exact bytes of every weight file that a stage writes."""
        found: dict[str, int] = {}
        for path, layout in self.outputs(stage).items():
            folder, slash, stem = path.rpartition("/")
            if path == "gguf/model":
                found[f"gguf/{FILE}"] = gguf_bytes(layout, self.gguf_keys)
                continue
            limit = sys.maxsize if path.endswith("adapter_model") else SHARD_BYTES
            found |= {f"{folder}{slash}{name}": size for name, size in folder_files(layout, limit, stem).items()}
        return found

    def tensor_count(self, stage: str) -> int:
        """Tensors a stage writes."""
        return sum(len(layout) for layout in self.outputs(stage).values())

    def reads(self, stage: str) -> int:
        """Bytes of weights that a stage reads, each file counted once."""
        return sum(self._weight_bytes(name) for name in read_by(stage, self.config, self.full_packed))

    def _weight_bytes(self, stage: str) -> int:
        return self.base_bytes() if stage == "source" else sum(self.files(stage).values())

    def base_bytes(self) -> int:
        """Bytes of the original model's tensors, fp32 where the header is not known yet."""
        shapes = self.architecture.tensors()
        return sum(math.prod(shape) * DTYPE_BYTES[self.dtypes.get(name, "F32")] for name, shape in shapes.items())


def choices_for(architecture: Architecture, role: str, layer: int, config: Config) -> list[Choice]:
    """The configurations one matrix is offered: block sizes that divide its blocked axis, superblocks that divide its
    blocks, ranks below its sides.

    Raises ConfigError if none is left.
    """
    settings = config.decompose
    rows, columns = shape_of(role, architecture.layers[layer])
    along = rows if PRUNED_AXIS[role] == "columns" else columns
    kept = columns if along == rows else rows
    found = [
        choice for choice in settings.formats() if choice.rank < min(rows, columns) and _splits(choice, kept, along)
    ]
    if not found:
        raise ConfigError(
            f"decompose: no configuration fits the {role} projection [{rows}, {columns}]: expected a block size that "
            f"divides {along} (have {list(settings.block_sizes)}), a superblock that divides the matrix's blocks (have "
            f"{list(settings.superblocks)}) and a rank below {min(rows, columns)} (have {list(settings.ranks)})"
        )
    return found


def _splits(choice: Choice, rows: int, columns: int) -> bool:
    """Whether no block or superblock of a stored [rows, columns] matrix would be ragged."""
    try:
        choice.superblocks(rows, columns)
    except ShapeError:
        return False
    return True


def allowed(architecture: Architecture, config: Config) -> Narrowed:
    """What the rules and ties leave of `choices_for`, for all matrices; raises ConfigError as these do."""
    offered = {}
    alike: dict[tuple[LayerShape, str], list[Choice]] = {}
    for layer, role, name in architecture.linears():
        key = (architecture.layers[layer], role)
        if key not in alike:
            alike[key] = choices_for(architecture, role, layer, config)
        offered[name] = alike[key]
    return narrow(offered, config.decompose.rules, config.decompose.ties)


def linear_budget(architecture: Architecture, dtypes: Mapping[str, str], config: Config) -> int:
    """Bytes that the packed linear maps may take together; not above 0 if a byte budget leaves them none."""
    budget = parse_budget(config.decompose.budget)
    if budget.kind == "bits":
        return int(budget.value * architecture.linear_weights() / 8)
    return int(budget.value) - fixed_bytes(architecture, dtypes, config)


def fixed_bytes(architecture: Architecture, dtypes: Mapping[str, str], config: Config) -> int:
    """Bytes of the decomposed model that no allocation changes, with the longest header that any can have."""
    dearest: dict[str, Choice] = {}
    longer = 0
    sizes_of = choice_bytes(architecture, config)
    for layer, role, name in architecture.linears():
        sizes = sizes_of[name]
        dearest[name] = max(sizes, key=sizes.__getitem__)
        shapes = {choice: layouts.packed_shape(architecture, layer, role, choice) for choice in sizes}
        entries = {choice: entry_bytes(layouts.packed(name, shape)) for choice, shape in shapes.items()}
        longer += max(entries.values()) - entries[dearest[name]]
    tensors = layouts.decomposed(architecture, dtypes, dearest, config.decompose.embeddings)
    files = folder_files(tensors)
    # In one file no choice has longer offsets than the dearest one; it may have longer shapes or more tensors, and a
    # header is padded to eight bytes. Among several files tensors move to other places when the choice changes: room
    # for offsets of any length.
    spare = longer + -longer % 8
    if len(files) > 1:
        spare += 2 * _OFFSET_DIGITS * len(tensors)
    return sum(files.values()) + spare - layouts.linear_bytes(tensors, architecture)


def estimate_allocation(architecture: Architecture, dtypes: Mapping[str, str], config: Config) -> dict[str, Choice]:
    """The dearest choice of each matrix within an even share of the budget: the plan's guess until it is solved."""
    share = linear_budget(architecture, dtypes, config) / architecture.linear_weights()
    found, bytes_of = {}, choice_bytes(architecture, config)
    for layer, role, name in architecture.linears():
        room = share * math.prod(shape_of(role, architecture.layers[layer]))
        sizes = bytes_of[name]
        fitting = [choice for choice in sizes if sizes[choice] <= room]
        found[name] = max(fitting, key=sizes.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)
    return found


def choice_bytes(architecture: Architecture, config: Config) -> dict[str, dict[Choice, int]]:
    """Bytes of every matrix under each configuration it may take."""
    found: dict[str, dict[Choice, int]] = {}
    sizes: dict[tuple[LayerShape, str, Choice], int] = {}
    choices = allowed(architecture, config).choices
    for layer, role, name in architecture.linears():
        found[name] = {}
        for choice in choices[name]:
            key = (architecture.layers[layer], role, choice)
            if key not in sizes:
                sizes[key] = layouts.packed_bytes(layouts.packed_shape(architecture, layer, role, choice))
            found[name][choice] = sizes[key]
    return found

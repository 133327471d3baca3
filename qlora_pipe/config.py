"""The configuration: frozen pydantic models, one canonical spelling, every default visible.

Descriptions of the fields are the documentation: `qlora-pipe init` writes them as comments and
`qlora-pipe schema` as JSON Schema.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_pipe.config_data import Data
from qlora_pipe.config_decompose import Decompose
from qlora_pipe.config_export import Export
from qlora_pipe.config_section import Count, Fraction, Positive, Rate, Section
from qlora_pipe.config_sparsity import PrunedEntries, check_chain, is_sparse
from qlora_pipe.config_training import Align, Compact, FirstCodes, Guide, Refine, Train
from qlora_pipe.errors import ConfigError
from qlora_pipe.units import parse_bytes
from quant.storage import BITSANDBYTES_BLOCKS


class Memory(Section):
    """What the plan is checked against; nothing is checked where it is null."""

    host: str | None = Field(None, description="host memory that may be used, e.g. 24GB")
    device: str | None = Field(None, description="device memory that may be used, e.g. 16GiB")

    @field_validator("host", "device")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            _as_value_error(parse_bytes, value)
        return value


class Calibrate(Section):
    """Passes over generic text, layer by layer: second moments of inputs and output gradients."""

    sequences: Positive = Field(32, description="calibration sequences")
    length: Positive = Field(1024, description="tokens per calibration sequence")
    covariance: bool = Field(True, description="also the full covariance of every input; false: mean squares alone")
    weighting: Literal["gradient", "none"] = Field(
        "gradient", description="weight of a token in the covariance: its squared output gradients, or 1"
    )


_LORAM = {"rounding": "loram", "protect_first": 4, "protect_last": 2}


class Prune(PrunedEntries):
    """Whole KV groups (with their query heads) and FFN channels, or single entries."""

    method: Literal["activation", "wanda", "flap", "taylor", "lora", "magnitude", "random"] = Field(
        "activation",
        description="how groups are ranked; the first four use the calibration moments, lora the gradients of slot C "
        "while it is trained and groups are masked (LoRAPrune, see guide)",
    )
    ratio: Fraction | None = Field(
        None,
        description="true reduction: share of the blocks' parameters that goes at least; null: kv_ratio and ffn_ratio",
    )
    widths: Literal["uniform", "allocated"] = Field(
        "uniform", description="allocated: each layer's own, by the least total loss under ratio"
    )
    losses: Literal["measured", "scores"] = Field(
        "measured",
        description="what allocated widths cost; measured: the least a layer may keep by how far predictions of "
        "generic text move, with the model in memory, in between by scores; scores: by these alone",
    )
    tokens: Positive = Field(2048, description="scored tokens of generic text that losses are measured on, at most")
    bias: bool = Field(
        False,
        description="true: what goes leaves its mean on the calibration text behind (FLAP), as biases of o and down; "
        "the small model then loads once qlora_pipe is imported",
    )
    kv_ratio: Fraction = Field(0.0, description="nominal share of the KV groups removed per layer, without ratio")
    ffn_ratio: Fraction = Field(0.0, description="nominal share of the FFN channels removed per layer, without ratio")
    align: Positive = Field(64, description="kept FFN channels are a multiple of this")
    protect_first: Count = Field(0, description="first layers left whole")
    protect_last: Count = Field(0, description="last layers left whole")
    rounding: Literal["aligned", "loram"] = Field(
        "aligned", description="of nominal ratios; loram: as LoRAM counts heads and channels, to the digit, unaligned"
    )
    preset: Literal["loram"] | None = Field(
        None,
        description="other defaults; loram: its rounding, the first four and the last two layers protected; with "
        "sparsity nothing, as there LoRAM protects none",
    )
    time_limit: Rate = Field(60.0, description="most seconds spent on proving allocated widths optimal")

    @model_validator(mode="before")
    @classmethod
    def _as_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("preset") != "loram" or is_sparse(value):
            return value
        return _LORAM | value

    @model_validator(mode="after")
    def _rounding_is_of_one_nominal_ratio(self) -> "Prune":
        if self.rounding == "loram" and (self.ratio is not None or self.kv_ratio != self.ffn_ratio):
            raise ValueError(
                "rounding: loram is defined for one nominal ratio: set kv_ratio and ffn_ratio to it, and ratio to null"
            )
        return self

    @model_validator(mode="after")
    def _allocated_widths_need_a_budget_and_comparable_losses(self) -> "Prune":
        if self.widths == "allocated":
            if self.ratio is None:
                raise ValueError("widths: allocated needs a budget: set ratio, the share of the parameters that goes")
            if self.method == "lora":
                raise ValueError("method: lora masks groups to widths it knows before: choose widths: uniform")
            if self.compares_scores and self.method in ("magnitude", "random"):
                raise ValueError(
                    f"method: {self.method} gives scores that cannot be compared across layers, which losses: scores "
                    "does; choose activation, wanda, flap or taylor, or losses: measured"
                )
        return self

    @property
    def removes(self) -> bool:
        """Whether any structure goes."""
        return bool(self.kv_ratio or self.ffn_ratio if self.ratio is None else self.ratio)

    @property
    def leaves_bias(self) -> bool:
        """Whether o and down get biases."""
        return self.bias and self.removes

    @property
    def compares_scores(self) -> bool:
        """Whether scores of different layers and kinds are set against each other."""
        return self.widths == "allocated" and self.losses == "scores"

    @property
    def measures(self) -> bool:
        """Whether losses are measured."""
        return self.widths == "allocated" and self.losses == "measured" and self.removes


class Recover(Section):
    """The small model's adapter put back on the full model."""

    base: Literal["original", "decomposed"] = Field("original", description="the full model that is deployed")
    scales: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0, 1.25),
        description="adapter scales tried on held-out rows; 0 is always tried",
    )
    correction: Literal["none", "emloc"] = Field(
        "none",
        description="emloc: the adapter is also tried with B corrected for what rounding changed in the weights it was "
        "trained on (EMLoC), and kept so if it is better on these rows",
    )
    rows: Positive = Field(24, description="held-out rows behind the choice, none of them used by evaluate")

    @field_validator("scales")
    @classmethod
    def _with_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({0.0, *value}))


class Evaluate(Section):
    """Perplexity of every model of the chain on held-out text."""

    tokens: Positive = Field(4096, description="scored tokens per data set, at most")
    length: Positive = Field(512, description="window of plain text, and most tokens per row of the task")


class Config(Section):
    """A whole run."""

    model: str = Field(description="hub id, local folder, .gguf file, or package:NAME")
    run: str | None = Field(None, description="run folder; default: runs/<name of this file>")
    seed: Count = Field(0, description="seed of everything random")
    device: str = Field("cpu", description="where training and evaluation happen: cpu or cuda")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute dtype")
    memory: Memory = Field(default_factory=Memory, description="memory limits the plan is checked against")
    train_budget: str | None = Field(
        None,
        description="most memory that training the small model may take, such as 20GB, on the device or else the host: "
        "decompose.budget is lowered until it fits, and where that is not enough prune.ratio is raised",
    )
    data: Data
    calibrate: Calibrate = Field(default_factory=Calibrate)
    decompose: Decompose = Field(default_factory=Decompose)
    refine: Refine = Field(default_factory=Refine)
    prune: Prune = Field(default_factory=Prune)
    guide: Guide = Field(default_factory=Guide)
    align: Align = Field(default_factory=Align)
    train: Train = Field(default_factory=Train)
    compact: Compact = Field(default_factory=Compact)
    recover: Recover = Field(default_factory=Recover)
    export: Export = Field(default_factory=Export)
    evaluate: Evaluate = Field(default_factory=Evaluate)

    @field_validator("train_budget")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            _as_value_error(parse_bytes, value)
        return value

    @property
    def compensates(self) -> bool:
        """Whether the small model has a slot C: it is trained while pruning, or after, or both."""
        return self.align.enabled or self.prune.method == "lora"

    def compact_init(self, bits: int) -> FirstCodes:
        """Where a matrix of that many bits of the integer model starts."""
        if self.compact.init != "auto":
            return self.compact.init
        able = self.calibrate.covariance and self.compact.offset != "trained"
        return "feedback" if able and bits <= 3 else "awmse"

    @property
    def compact_transfers(self) -> bool:
        """Whether the integer model's adapter is put at the full model's shapes: not if slot C, which belongs to the
        small model alone, is part of it, and not where it never was in an integer."""
        l4q = self.compact.enabled and self.compact.method == "l4q"
        return l4q and not (self.compensates and self.compact.warm_start)

    @model_validator(mode="after")
    def _zeros_stay_zero(self) -> "Config":
        check_chain(
            self.prune.sparsity,
            covariance=self.calibrate.covariance,
            compact=self.compact.enabled,
            refine=self.refine.enabled,
            grids=self.decompose.grids,
        )
        return self

    @model_validator(mode="after")
    def _original_weights_have_no_zeros(self) -> "Config":
        if self.train.base == "original" and self.prune.sparsity.enabled:
            raise ValueError(
                "train.base: original trains on weights of which prune.sparsity takes nothing away: set train.base to "
                "packed, or prune.sparsity.pattern to none"
            )
        return self

    @model_validator(mode="after")
    def _original_weights_have_no_bits_to_lower(self) -> "Config":
        if self.train_budget is not None and self.train.base == "original":
            raise ValueError(
                "train_budget lowers the bits of the model that is trained, and train.base: original trains on its "
                "original weights: set train.base to packed, or leave train_budget out"
            )
        return self

    @model_validator(mode="after")
    def _trained_low_rank_parts_are_there(self) -> "Config":
        if self.train.low_rank == "frozen":
            return self
        if 0 in self.decompose.ranks:
            raise ValueError(
                "train.low_rank: trained needs a low-rank part in every matrix: leave 0 out of decompose.ranks, or set "
                "train.low_rank to frozen"
            )
        if self.compact.enabled and self.compact.warm_start:
            raise ValueError(
                "compact.warm_start goes on from a new adapter, and train.low_rank: trained makes none: set "
                "compact.warm_start to false, or train.low_rank to frozen"
            )
        return self

    @model_validator(mode="after")
    def _corrections_have_a_difference(self) -> "Config":
        if self.recover.correction == "none":
            return self
        if self.prune.sparsity.enabled:
            raise ValueError(
                "recover.correction: emloc would make up for the entries that prune.sparsity takes, which are back in "
                "the full model: set recover.correction to none"
            )
        if (self.train.base == "original") == (self.recover.base == "original"):
            raise ValueError(
                f"recover.correction: emloc makes up for a difference of weights, and train.base: {self.train.base} "
                f"has those of recover.base: {self.recover.base}: set correction to none, or one base to another"
            )
        return self

    @model_validator(mode="after")
    def _integer_formats_have_a_model(self) -> "Config":
        if self.export.integer and not self.compact.enabled:
            raise ValueError(
                f"export.integer: {self.export.integer[0]} is a format of the integer model, which compact.enabled: "
                "false leaves out: set it to true, or export.integer to []"
            )
        return self

    @model_validator(mode="after")
    def _packed_formats_hold_the_model(self) -> "Config":
        if not self.export.packed:
            return self
        blocks = [size for size in self.decompose.block_sizes if size not in BITSANDBYTES_BLOCKS]
        for differs, found, instead in (
            (self.decompose.grids != ("nf",), f"levels of {self.decompose.grids}", "decompose.grids to [nf]"),
            (self.decompose.bits != (4,), f"codes of {self.decompose.bits} bits", "decompose.bits to [4]"),
            (blocks, f"blocks of {blocks}", f"decompose.block_sizes to some of {list(BITSANDBYTES_BLOCKS)}"),
            (self.refine.enabled, "levels that refine moved", "refine.enabled to false"),
        ):
            if differs:
                raise ValueError(
                    f"export.packed: bitsandbytes has NormalFloat levels at 4 bits, and no {found}: set {instead}, or "
                    "export.packed to []"
                )
        return self

    @model_validator(mode="after")
    def _feedback_has_covariances(self) -> "Config":
        if self.compact.enabled and self.compact.init == "feedback" and not self.calibrate.covariance:
            raise ValueError(
                "compact.init: feedback needs covariances, which calibrate.covariance: false leaves out: set it to "
                "true, or compact.init to awmse"
            )
        return self


def _as_value_error(parse: Any, value: str) -> None:
    try:
        parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error

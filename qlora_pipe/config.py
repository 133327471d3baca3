"""The configuration: frozen pydantic models, one canonical spelling, every default visible.

Descriptions of the fields are the documentation: `qlora-pipe init` writes them as comments and
`qlora-pipe schema` as JSON Schema.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from qlora_pipe.config_decompose import Decompose
from qlora_pipe.config_section import Count, Fraction, Positive, Rate, Section
from qlora_pipe.config_training import Align, Compact, FirstCodes, Guide, Refine, Train
from qlora_pipe.errors import ConfigError
from qlora_pipe.units import parse_bytes


class Dataset(Section):
    """A text or a set of records, read as data, never executed."""

    source: str = Field(description="a file, or package:NAME:PATH for a file inside an installed package")
    prompt: str | None = Field(None, description="template of the user turn, e.g. 'Tell me about {title}.'")
    response: str | None = Field(None, description="template of the answer; only its tokens are scored")
    text: str | None = Field(None, description="template of a plain-text record; none: the file is one text")
    exclude: tuple[str, ...] = Field((), description="records whose first template field is one of these are dropped")
    heldout: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="share of the records (or of the end of the text) kept for evaluation"
    )

    @model_validator(mode="after")
    def _templates_agree(self) -> "Dataset":
        if (self.prompt is None) != (self.response is None):
            raise ValueError("prompt and response go together: give both, or neither")
        if self.prompt is not None and self.text is not None:
            raise ValueError("give prompt and response, or text, not all three")
        return self


def _dataset_shorthand(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


DatasetField = Annotated[Dataset, BeforeValidator(_dataset_shorthand, json_schema_input_type=str | Dataset)]


TASK = "task"
"""Name of the task's own held-out text in every table."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Data(Section):
    """What text is used for what."""

    calibration: DatasetField = Field(description="generic text for the calibration pass")
    task: DatasetField = Field(description="what the adapter is trained on, and held-out rows of it")
    evaluation: dict[Name, DatasetField] = Field(
        default_factory=dict, description="further texts to measure perplexity on, by name; whole unless heldout is set"
    )

    @field_validator("evaluation")
    @classmethod
    def _whole_texts(cls, value: dict[str, Dataset]) -> dict[str, Dataset]:
        if TASK in value:
            raise ValueError(f"{TASK} is the name of the task's own held-out rows; choose another")
        return {
            name: text if "heldout" in text.model_fields_set else text.model_copy(update={"heldout": 1.0})
            for name, text in value.items()
        }


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


class Prune(Section):
    """Whole KV groups (with their query heads) and FFN channels."""

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
        "uniform", description="allocated: each layer's widths by the least total score that goes, under ratio"
    )
    kv_ratio: Fraction = Field(0.0, description="nominal share of the KV groups removed per layer, without ratio")
    ffn_ratio: Fraction = Field(0.25, description="nominal share of the FFN channels removed per layer, without ratio")
    align: Positive = Field(64, description="kept FFN channels are a multiple of this")
    protect_first: Count = Field(0, description="first layers left whole")
    protect_last: Count = Field(0, description="last layers left whole")
    rounding: Literal["aligned", "loram"] = Field(
        "aligned", description="of nominal ratios; loram: as LoRAM counts heads and channels, to the digit, unaligned"
    )
    preset: Literal["loram"] | None = Field(
        None, description="other defaults; loram: its rounding, the first four and the last two layers protected"
    )
    time_limit: Rate = Field(60.0, description="most seconds spent on proving allocated widths optimal")

    @model_validator(mode="before")
    @classmethod
    def _as_preset(cls, value: Any) -> Any:
        return _LORAM | value if isinstance(value, dict) and value.get("preset") == "loram" else value

    @model_validator(mode="after")
    def _rounding_is_of_one_nominal_ratio(self) -> "Prune":
        if self.rounding == "loram" and (self.ratio is not None or self.kv_ratio != self.ffn_ratio):
            raise ValueError(
                "rounding: loram is defined for one nominal ratio: set kv_ratio and ffn_ratio to it, and ratio to null"
            )
        return self

    @model_validator(mode="after")
    def _allocated_widths_need_a_budget_and_comparable_scores(self) -> "Prune":
        if self.widths == "allocated":
            if self.ratio is None:
                raise ValueError("widths: allocated needs a budget: set ratio, the share of the parameters that goes")
            if self.method in ("lora", "magnitude", "random"):
                raise ValueError(
                    f"method: {self.method} gives scores that cannot be compared across layers, which widths: "
                    "allocated does; choose activation, wanda, flap or taylor, or widths: uniform"
                )
        return self

    @property
    def removes(self) -> bool:
        """Whether anything goes."""
        return bool(self.kv_ratio or self.ffn_ratio if self.ratio is None else self.ratio)


class Recover(Section):
    """The small model's adapter put back on the full model."""

    base: Literal["original", "decomposed"] = Field("original", description="the full model that is deployed")
    scales: tuple[float, ...] = Field(
        (0.0, 0.25, 0.5, 0.75, 1.0, 1.25),
        description="adapter scales tried on held-out rows; 0 is always tried",
    )
    rows: Positive = Field(24, description="held-out rows behind the choice, none of them used by evaluate")

    @field_validator("scales")
    @classmethod
    def _with_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({0.0, *value}))


class Export(Section):
    """Which folders other tools load."""

    peft: bool = Field(True, description="the adapter for the full model, a stock PEFT folder")
    merged: bool = Field(True, description="the full model with the adapter added")
    small: bool = Field(True, description="the pruned and trained model; needs equal widths in every layer")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of exported dense weights")


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
        small model alone, is part of it."""
        return self.compact.enabled and not (self.compensates and self.compact.warm_start)

    @model_validator(mode="after")
    def _feedback_has_covariances(self) -> "Config":
        if self.compact.enabled and self.compact.init == "feedback" and not self.calibrate.covariance:
            raise ValueError(
                "compact.init: feedback needs covariances, which calibrate.covariance: false leaves out: set it to "
                "true, or compact.init to awmse"
            )
        return self

    @model_validator(mode="after")
    def _small_has_equal_widths(self) -> "Config":
        prune = self.prune
        if not (self.export.small and prune.removes):
            return self
        if prune.widths == "allocated":
            raise ValueError(
                "export.small needs equal widths in every layer, but prune.widths: allocated gives each layer its own: "
                "set export.small to false, or prune.widths to uniform"
            )
        if prune.protect_first or prune.protect_last:
            raise ValueError(
                "export.small needs equal widths in every layer, but prune.protect_first or "
                "prune.protect_last keeps some layers whole: set both to 0, or export.small to false"
            )
        return self


def _as_value_error(parse: Any, value: str) -> None:
    try:
        parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error

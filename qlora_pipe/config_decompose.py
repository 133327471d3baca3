"""Settings of the decomposition: W = Q + L1 L2 with a configuration per matrix under a budget."""

import itertools
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from qlora_pipe.config_rules import Rule, Tie
from qlora_pipe.config_section import Count, Positive, Rate, Section
from qlora_pipe.errors import ConfigError
from qlora_pipe.units import parse_budget
from quant.storage import SEARCHED, UNSEARCHED, Choice

_PUBLISHED: dict[str, Any] = {
    "metric": "fisher",
    "rounding": "nearest",
    "grids": ("nf",),
    "bits": (2, 3, 4),
    "block_sizes": (16, 32, 64),
    "ranks": (64,),
    "scale_bits": (2, 3, 4),
    "scale_dtypes": ("bfloat16", "float16", "float32"),
    "superblocks": (16, 64, 256),
    "factor_dtype": "bfloat16",
    "scale_search": False,
    "table": "full",
    "iterations": 100,
}
"""What `method: lq` stands for: the 243 configurations of LQ-LoRA (arXiv 2311.12023); `bits` and `scale_bits` with 8
make its 432."""

_SEARCH = {"budget", "ties", "rules", "time_limit"}
"""Settings of the allocation, which no entry of the error table depends on."""


class Decompose(Section):
    """W = Q + L1 L2 with a configuration per matrix, chosen by an integer programme."""

    method: Literal["auto", "lq"] = Field(
        "auto",
        description="auto: the settings below; lq: LQ-LoRA as published, whose values replace the defaults below "
        "(its loop also returns the last iterate, not the best)",
    )
    budget: str = Field("3.5bits", description="total bits per block weight (3.5bits), or bytes of the model (2GB)")
    metric: Literal["covariance", "fisher", "none"] = Field(
        "covariance",
        description="what an error costs: by the inputs' full covariance, by mean squares of inputs (LQ-LoRA's "
        "Fisher), or alike everywhere",
    )
    loss_scale: bool = Field(True, description="weight the error of an output by its gradients")
    rounding: Literal["feedback", "nearest"] = Field(
        "feedback", description="feedback: later columns make up for earlier ones' errors (needs the covariance)"
    )
    damping: Rate = Field(0.03, description="added to the covariance's diagonal for feedback, as a share of its mean")
    grids: tuple[Literal["nf", "lloyd", "int", "uint"], ...] = Field(
        ("lloyd",),
        description="where codes may lie: NormalFloat or Lloyd levels, or integers without or with a zero point; the "
        "integers have plain float16 scales, as GPTQ checkpoints do",
    )
    bits: tuple[Literal[2, 3, 4, 8], ...] = Field((2, 3, 4), description="code widths to choose from")
    block_sizes: tuple[Positive, ...] = Field((16, 32, 64, 128, 192), description="weights per scale to choose from")
    ranks: tuple[Count, ...] = Field((0, 16, 32, 64), description="ranks of the low-rank part to choose from")
    scale_bits: tuple[Literal[2, 3, 4, 8, 16, 32], ...] = Field(
        (8,), description="bits of a scale: below 16 a code within its superblock, else the scale itself"
    )
    scale_dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = Field(
        ("bfloat16",), description="second-level maxima; with scale_bits 16 or 32 the scales"
    )
    superblocks: tuple[Positive | Literal["row"], ...] = Field(
        ("row",), description="blocks that share one second-level maximum, row by row; row: those of one row"
    )
    scale_search: bool = Field(
        True, description="take the best of five scales for every block; false: its largest weight fits exactly"
    )
    factor_dtype: Literal["bfloat16", "float16", "float32", "int8"] = Field("int8", description="low-rank factors")
    embeddings: Literal["keep", "int8"] = Field(
        "keep",
        description="embedding and head of the packed models: as the checkpoint has them, or 8-bit integers with "
        "float16 scales",
    )
    ties: tuple[Tie, ...] = Field(
        (("q", "k", "v"), ("gate", "up")),
        description="what takes the same configuration: roles of a layer, or a pattern of module names",
    )
    rules: tuple[Rule, ...] = Field(
        (), description="floors and fixed choices, such as {layers: [0, -1], roles: [down], min_bits: 4}"
    )
    table: Literal["estimated", "full"] = Field(
        "estimated",
        description="behind an entry of the error table; estimated: one factorisation and one rounding of sampled "
        "outputs, scaled to whole decompositions of three ranks; full: the whole decomposition",
    )
    table_outputs: Positive = Field(128, description="outputs of a matrix behind an estimated entry")
    start: Literal["lowrank", "quantize"] = Field(
        "lowrank", description="part that is made first; quantize: LoftQ's loop, all iterations and the last returned"
    )
    iterations: Positive = Field(4, description="most alternations of a decomposition")
    time_limit: Rate = Field(60.0, description="seconds the exact solver may take; cut short, it states the gap")

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("method") == "lq":
                return _PUBLISHED | value
            if value.get("metric") not in (None, "covariance"):
                return {"rounding": "nearest"} | value
        return value

    @field_validator("budget")
    @classmethod
    def _is_budget(cls, value: str) -> str:
        try:
            parse_budget(value)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("grids", "bits", "block_sizes", "ranks", "scale_bits", "scale_dtypes", "superblocks")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("expected at least one value to choose from")
        return tuple(sorted(set(value), key=lambda entry: (isinstance(entry, str), entry)))

    @model_validator(mode="after")
    def _agrees(self) -> "Decompose":
        if self.rounding == "feedback" and self.metric != "covariance":
            raise ValueError("rounding: feedback needs metric: covariance; set rounding to nearest, or metric")
        if self.method == "lq" and self.metric == "covariance":
            raise ValueError("method: lq has metric fisher or none; set one of them, or method to auto")
        self.formats()
        return self

    @property
    def patience(self) -> int | None:
        """Alternations without improvement that end a decomposition; None ends it as published."""
        return None if self.method == "lq" else 2

    @property
    def multiples(self) -> tuple[float, ...]:
        """Of a block's largest weight, tried as its scale."""
        return SEARCHED if self.scale_search else UNSEARCHED

    def measured(self) -> dict[str, Any]:
        """What the error table and the decomposition of the linear maps depend on, as JSON."""
        return self.model_dump(mode="json", exclude={*_SEARCH, "embeddings"})

    def tables(self) -> dict[str, Any]:
        """What embedding and head depend on, as JSON: nothing if they are kept."""
        return {} if self.embeddings == "keep" else {"embeddings": self.embeddings}

    def formats(self) -> list[Choice]:
        """Every configuration these settings offer to a matrix of any shape; ValueError for scales of no format."""
        found = []
        for grid, bits, block, rank in itertools.product(self.grids, self.bits, self.block_sizes, self.ranks):
            if grid in ("int", "uint"):
                found.append(Choice(grid, bits, block, rank, 16, "float16", factor_dtype=self.factor_dtype))
                continue
            for scale_bits, dtype, size in itertools.product(self.scale_bits, self.scale_dtypes, self.superblocks):
                superblock = None if size == "row" else size
                found.append(Choice(grid, bits, block, rank, scale_bits, dtype, superblock, self.factor_dtype))
        return found

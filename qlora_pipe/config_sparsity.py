"""Settings of pruning that changes no shape: single entries go, whole groups stay."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora_pipe.config_section import Section

_FIXED = 0.5
"""What 2:4 and 4:8 leave out."""


class Sparsity(Section):
    """Exact zeros among the codes: LoRAM-Unst and LoRAM-Semi. Codes stay dense, so no byte is saved by them."""

    pattern: Literal["none", "unstructured", "2:4", "4:8"] = Field(
        "none", description="entries of a matrix that go; 2:4 and 4:8: so many of every 4 or 8 along the inputs"
    )
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.55, description="share of the entries of every matrix that goes; 0.5 with 2:4 and 4:8"
    )
    by: Literal["sparsegpt", "wanda"] = Field(
        "sparsegpt",
        description="sparsegpt: what an entry's loss costs if later columns make up for it; wanda: its magnitude times "
        "its input's",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_pattern(cls, value: Any) -> Any:
        return {"ratio": _FIXED} | value if isinstance(value, dict) and ":" in str(value.get("pattern")) else value

    @model_validator(mode="after")
    def _the_pattern_fixes_the_ratio(self) -> "Sparsity":
        if self.group is not None and self.ratio != _FIXED:
            raise ValueError(
                f"pattern {self.pattern} leaves out {_FIXED} of the entries: leave ratio out, or set pattern to "
                "unstructured"
            )
        return self

    @property
    def enabled(self) -> bool:
        """Whether entries go."""
        return self.pattern != "none"

    @property
    def group(self) -> int | None:
        """Consecutive inputs of which the same number goes; None: any entries."""
        _, _, size = self.pattern.partition(":")
        return int(size) if size else None


class PrunedEntries(Section):
    """What `prune` has beside the settings of structure, and that it excludes them."""

    sparsity: Sparsity = Field(
        default_factory=Sparsity, description="single entries instead of whole groups; all other settings are of groups"
    )

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "PrunedEntries":
        if not self.sparsity.enabled:
            return self
        neutral = {name: field.default for name, field in type(self).model_fields.items()}
        given = [
            name
            for name, value in neutral.items()
            if name not in ("sparsity", "preset") and getattr(self, name) != value
        ]
        if given:
            raise ValueError(
                f"sparsity takes single entries, and about whole groups are {', '.join(given)}: leave them out, or set "
                "sparsity.pattern to none"
            )
        return self


def is_sparse(prune: Any) -> bool:
    """Whether raw settings of `prune` ask for single entries."""
    given = prune.get("sparsity") if isinstance(prune, dict) else None
    if isinstance(given, Sparsity):
        return given.enabled
    return isinstance(given, dict) and given.get("pattern", "none") != "none"


def check_chain(sparsity: Sparsity, *, covariance: bool, compact: bool, refine: bool, grids: Collection[str]) -> None:
    """Raise ValueError for settings of other sections under which there would be no exact zeros, or no gain by them."""
    if not sparsity.enabled:
        return
    if not covariance:
        raise ValueError(
            "prune.sparsity needs the covariance of the inputs, for later columns make up for zeros: set "
            "calibrate.covariance to true"
        )
    if compact:
        raise ValueError(
            "prune.sparsity leaves every shape as it is, and the integer model that compact trains would be dense and "
            "as large as the whole model's: set compact.enabled to false"
        )
    if refine and not set(grids) <= {"int", "uint"}:
        raise ValueError(
            "prune.sparsity needs a code for exactly zero, and refine moves the level that stands for it: set "
            "refine.enabled to false, or decompose.grids to int or uint"
        )

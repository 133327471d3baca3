"""Rules for some matrices, and ties between them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from qlora_pipe.config_section import Count, Positive, Role, Section
from qlora_pipe.config_yaml import dump_value

Width = Literal[2, 3, 4, 8]
"""Bits of a code."""


class Selector(Section):
    """Which matrices a rule is for."""

    layers: tuple[int, ...] | None = Field(None, description="which layers, all if left out; -1 is the last")
    roles: tuple[Role, ...] | None = Field(None, description="which roles, all if left out")
    name: str | None = Field(None, description="pattern of module names, such as model.layers.*.mlp.*")

    @field_validator("layers", "roles")
    @classmethod
    def _not_empty(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value == ():
            raise ValueError("expected at least one; leave the setting out where all are meant")
        return value

    def __str__(self) -> str:
        return dump_value(self.model_dump(mode="json", exclude_none=True))


class BitsRule(Selector):
    """The bits of some matrices."""

    bits: Width = Field(description="bits of the integer grid")


class Rule(Selector):
    """What some matrices may take: floors, ceilings and fixed choices."""

    min_bits: Positive | None = Field(None, description="code width at least")
    max_bits: Positive | None = Field(None, description="code width at most")
    bits: Positive | None = Field(None, description="code width exactly")
    block_size: Positive | None = Field(None, description="weights per first-level scale exactly")
    rank: Count | None = Field(None, description="rank of the low-rank part exactly")

    @model_validator(mode="after")
    def _constrains(self) -> "Rule":
        constraints = self.model_fields_set - set(Selector.model_fields)
        if all(getattr(self, name) is None for name in constraints):
            raise ValueError(
                "a rule needs at least one of min_bits, max_bits, bits, block_size, rank; without any it does nothing"
            )
        return self


def _kind(value: Any) -> str:
    return "pattern" if isinstance(value, str) else "roles"


Tie = Annotated[Annotated[tuple[Role, ...], Tag("roles")] | Annotated[str, Tag("pattern")], Discriminator(_kind)]
"""Roles of one layer, in every layer; or a pattern of module names, whose matches are one group."""

"""Settings of what other tools load."""

from typing import Literal

from pydantic import Field, field_validator

from qlora_pipe.config_section import Section

PackedFormat = Literal["bitsandbytes"]
"""Formats of other tools for the full decomposed model; the folder of each has its name."""

IntegerFormat = Literal["compressed-tensors", "gptq", "gptq_v2", "gguf"]
"""Formats of other tools for the integer model; the folder of each has its name."""


class Export(Section):
    """Which folders other tools load."""

    peft: bool = Field(True, description="the adapter for the full model, a stock PEFT folder")
    merged: bool = Field(True, description="the full model with the adapter added")
    small: bool = Field(
        True, description="the pruned and trained model; of unequal widths, or with prune.bias, only we load it"
    )
    integer: tuple[IntegerFormat, ...] | None = Field(
        None,
        description="formats of the integer model, of compressed-tensors, gptq, gptq_v2 and gguf; null: "
        "compressed-tensors, which keeps it exactly, if that can hold it; []: none",
    )
    packed: tuple[PackedFormat, ...] = Field(
        (),
        description="formats of the full decomposed model, of bitsandbytes; o and down, whose scales lie along their "
        "outputs here, are dense there",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of exported dense weights")

    @field_validator("integer", "packed")
    @classmethod
    def _once_each(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return value if value is None else tuple(dict.fromkeys(value))

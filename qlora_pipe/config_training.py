"""Settings of everything that is trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qlora_pipe.config_rules import BitsRule, Width
from qlora_pipe.config_section import Count, Fraction, Positive, Rate, Section

FirstCodes = Literal["feedback", "awmse", "mse", "l4q", "symmetric", "lsq+", "asymmetric"]
"""Ways to choose the first codes and steps of the integer model."""


class Optimisation(Section):
    """What transformers' Trainer is told."""

    learning_rate: Rate = Field(5e-4, description="peak learning rate")
    steps: Positive = Field(100, description="optimiser steps")
    batch_size: Positive = Field(4, description="rows per forward pass")
    accumulation: Positive = Field(1, description="forward passes per optimiser step")
    length: Positive = Field(256, description="most tokens per row; longer rows are cut")
    warmup: Fraction = Field(0.1, description="share of the steps that warm up")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning-rate schedule")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of adapter factors, or of lsq's weights")
    clip: Rate = Field(1.0, description="largest gradient norm")
    optimizer: Literal["adamw", "adamw_8bit"] = Field("adamw", description="adamw_8bit: bitsandbytes")
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    save_steps: Positive = Field(25, description="steps between checkpoints a killed run resumes from")

    def decisive(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return self.model_dump(mode="json", exclude={"save_steps"})


class Blocks(Optimisation):
    """An optimisation of all blocks together, and before it of one after the other."""

    block_rows: Count = Field(0, description="calibration rows on which block after block is tuned first; 0: none")
    block_epochs: Positive = Field(2, description="times that a block sees its rows")
    block_rate: Rate = Field(1e-3, description="peak learning rate while a block is tuned")
    steps: Count = Field(100, description="optimiser steps of the end-to-end part; 0: none")


class Refine(Blocks):
    """Scales, levels and low-rank factors tuned to the original's predictions on calibration text, codes fixed."""

    enabled: bool = Field(False, description="true: tune them; for the end-to-end part both models are in memory")
    block_rate: Rate = Field(1e-3, description="peak relative change in a step of a block")
    learning_rate: Rate = Field(4e-3, description="peak relative change in a step of the end-to-end part")
    batch_size: Positive = Field(1, description="rows per forward pass")
    length: Positive = Field(512, description="tokens per row")


class Adapter(Optimisation):
    """An optimisation of LoRA factors."""

    rank: Positive = Field(16, description="rank of the adapter")
    alpha: Rate = Field(32.0, description="the adapter is scaled by alpha / rank")


class Taught(Adapter):
    """LoRA factors that may learn from the original model too."""

    teacher: Literal["original", "none"] = Field(
        "none", description="whose predictions are learnt beside the text: the original model's, or none"
    )
    teacher_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="share of the teacher in the loss; the text itself has the rest"
    )
    top: Positive = Field(64, description="next tokens that are learnt one by one from the teacher, the rest as one")

    @property
    def asks(self) -> bool:
        """Whether the teacher is asked."""
        return self.teacher == "original"

    def decisive(self) -> dict[str, Any]:
        """Those of the teacher matter if there is one."""
        found = super().decisive()
        return found if self.asks else {name: found[name] for name in found if name not in ("teacher_share", "top")}


class Guide(Optimisation):
    """prune.method lora: slot C learns generic text, and more and more groups are masked by what its gradients say."""

    start: Fraction = Field(0.1, description="share of the steps before the first mask")
    cooldown: Fraction = Field(0.1, description="share of the steps after the last mask")
    interval: Positive = Field(10, description="steps between new masks")
    decay: Fraction = Field(0.9, description="of the moving average of scores, at every step")
    eta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the score's term that is quadratic in the (clipped) gradients; 1 as published"
    )
    sides: Literal["matched", "published"] = Field(
        "matched",
        description="what slot C starts from; matched: in o and down B is random and A zero, so that columns, which "
        "are what goes there, are told apart from the first step on; published: A is random and B zero everywhere",
    )

    shrink: bool = Field(
        False, description="true: what is masked is left out of the computation, in fewer bytes and less time a step"
    )

    @model_validator(mode="after")
    def _leaves_a_ramp(self) -> "Guide":
        if self.start + self.cooldown >= 1:
            raise ValueError("start and cooldown are shares of the steps: together they must leave some to prune in")
        return self


class Align(Taught):
    """Slot C: LoRA on generic text, which makes up for what pruning removed; the full model does not get it."""

    enabled: bool = Field(False, description="true: train it; the task's adapter is then trained on top")
    teacher: Literal["original", "none"] = Field(
        "original", description="whose predictions it learns: the original model's, or none but the text itself"
    )
    teacher_share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the teacher in the loss; the text itself has the rest"
    )


class Tuning(Taught):
    """An optimisation on the task's records."""

    packing: bool = Field(
        False,
        description="short rows share one of at most length tokens, and none sees another; batches then waste little",
    )


class Train(Tuning):
    """Slot T: additive LoRA on the sliced Q + L1 L2, and on slot C if there is one."""

    base: Literal["packed", "original"] = Field(
        "packed",
        description="what the adapter is trained on; original: the small model's original weights, dense in the "
        "compute dtype: plain LoRA, in more memory",
    )
    low_rank: Literal["frozen", "trained"] = Field(
        "frozen",
        description="L1 L2; trained: it takes the place of a new adapter, as in LQ-LoRA and LoftQ, and what is put "
        "back on the full model is what it moved by, of twice its rank; rank and alpha then say nothing",
    )

    @model_validator(mode="after")
    def _original_weights_have_no_low_rank_part(self) -> "Train":
        if self.base == "original" and self.low_rank == "trained":
            raise ValueError(
                "base: original has no low-rank part that low_rank: trained could train: set base to packed, or "
                "low_rank to frozen"
            )
        return self


class Compact(Blocks, Tuning):
    """L4Q, or a method it is measured beside, on the pruned original weights: what was trained is the integer model
    that is shipped."""

    enabled: bool = Field(True, description="false: only the adapter for the full model is made")
    method: Literal["l4q", "qat-lora", "qa-lora", "lsq"] = Field(
        "l4q",
        description="what is trained; l4q: steps, and factors that are added before rounding; qat-lora: steps, and an "
        "adapter beside the rounded weight, with which it stays; qa-lora: offsets alone, by an adapter that sees the "
        "sum of each input group; lsq: steps and the weight itself, 16 bytes a weight",
    )
    bits: Width = Field(4, description="bits of the integer grid")
    rules: tuple[BitsRule, ...] = Field(
        (), description="other bits for some matrices, such as {roles: [down], bits: 8}; the last rule counts"
    )
    group_size: Positive = Field(64, description="weights per step size, along the input")
    offset: Literal["auto", "zero", "half", "trained"] = Field(
        "auto",
        description="what code 0 stands for: 0, half a step or a number; auto: half at 2 bits, else zero, from where "
        "qa-lora goes on",
    )
    learning_rate: Rate = Field(2e-4, description="peak learning rate of the adapter factors, or of lsq's weights")
    step_rate: Rate = Field(2e-5, description="peak learning rate of the step sizes, and of trained offsets")
    block_rate: Rate = Field(3e-3, description="peak learning rate of the adapter factors while a block is tuned")
    block_step_rate: Rate = Field(3e-4, description="the same of the step sizes, and of trained offsets")
    init: Literal["auto", FirstCodes] = Field(
        "auto",
        description="first codes, steps; feedback: rounded so that errors make up for each other, each weight put "
        "where its code is the nearest; awmse, mse: nearest codes, steps of least error, with each input by its mean "
        "square or plain; auto: feedback at 2 and 3 bits where covariances and the offset allow it, else awmse",
    )
    base: Literal["dense", "int8", "int4"] = Field(
        "dense", description="the frozen weight: in the compute dtype, or packed as places in the cells of the grid"
    )
    fused: bool = Field(
        True, description="on CUDA with Triton: what happens to a weight between the products is one kernel, if it fits"
    )
    warm_start: bool = Field(
        True, description="start from the trained adapter: in the factors, with qa-lora and lsq in what is rounded"
    )

    @model_validator(mode="after")
    def _init_suits_the_offset(self) -> "Compact":
        if self.init == "asymmetric" and self.offset != "trained":
            raise ValueError("init: asymmetric is for trained offsets; set offset to trained, or init to awmse")
        packed = (f"base: {self.base}", self.base != "dense")
        for name, chosen in (("init: feedback", self.init == "feedback"), packed):
            if chosen and self.offset == "trained":
                raise ValueError(f"{name} needs levels that are tied to the steps; set offset to auto, zero or half")
        return self

    @model_validator(mode="after")
    def _method_suits_the_grid(self) -> "Compact":
        if self.method == "qa-lora" and self.offset in ("zero", "half"):
            raise ValueError(
                f"method: qa-lora trains offsets, which offset: {self.offset} leaves no room for; set offset to auto, "
                "to begin at zero or half a step, or to trained"
            )
        if self.base != "dense" and self.method in ("qa-lora", "lsq"):
            why = "trains the weight" if self.method == "lsq" else "holds its codes packed in any case"
            raise ValueError(f"method: {self.method} {why}: base: {self.base} is for l4q and qat-lora; set it to dense")
        return self

    @model_validator(mode="after")
    def _parts_suit_each_other(self) -> "Compact":
        if self.asks and not self.steps:
            raise ValueError("teacher: original is learnt from end to end: set steps, or teacher to none")
        if self.block_rows and self.method != "l4q":
            raise ValueError(f"block_rows are for method: l4q, found {self.method}: set block_rows to 0")
        return self

    @model_validator(mode="after")
    def _base_holds_places(self) -> "Compact":
        widest = max((self.bits, *(rule.bits for rule in self.rules)))
        if self.base == "int4" and widest > 2:
            raise ValueError(
                f"base: int4 has too few places in the cells of a grid of {widest} bits; set base to int8, or bits, in "
                "rules too, to 2"
            )
        return self

    def decisive(self) -> dict[str, Any]:
        """Those of the blocks matter if they are tuned one by one."""
        found = super().decisive()
        unused = () if self.block_rows else ("block_epochs", "block_rate", "block_step_rate")
        return {name: found[name] for name in found if name not in unused}

    @property
    def packed_bits(self) -> int | None:
        """Bits of a packed frozen weight; None: it is dense."""
        return {"dense": None, "int8": 8, "int4": 4}[self.base]

    @property
    def leaves_adapter(self) -> bool:
        """Whether there are LoRA factors in the end: in l4q's integers, beside those of qat-lora."""
        return self.method in ("l4q", "qat-lora")

    @property
    def goes_on(self) -> bool:
        """Whether factors begin as those of the trained adapter."""
        return self.warm_start and self.leaves_adapter

    @property
    def trains_offsets(self) -> bool:
        """Whether the integer model has offsets of its own."""
        return self.offset == "trained" or self.method == "qa-lora"

    def offset_at(self, bits: int) -> Literal["zero", "half", "trained"]:
        """The offset of a matrix of that many bits."""
        return "trained" if self.trains_offsets else self.first_offset_at(bits)

    def first_offset_at(self, bits: int) -> Literal["zero", "half", "trained"]:
        """The offset that its first codes are chosen for."""
        if self.offset == "auto":
            return "half" if bits == 2 else "zero"
        return self.offset

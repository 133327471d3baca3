"""Tuning a model block by block: each decoder layer to another model's output, on the tuned layers before it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.artifacts.scratch import Scratch
from qlora_pipe.config_training import Blocks
from qlora_pipe.errors import StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.calibration import Arguments, CalibrationBatch
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.training import factors_and_steps
from quant.fakequant import L4QLinear
from quant.tunable import TunableLinear

Take = Callable[[int, nn.Module], None]
"""Given the number of a tuned decoder layer and the layer, in order; it has no weights afterwards."""


def tune_blocks(
    teacher: LayerStream,
    student: LayerStream,
    batches: Sequence[CalibrationBatch],
    settings: Blocks,
    take: Take,
    *,
    section: str,
    folder: Path,
    seed: int,
    reporter: Reporter,
    step_rate: float | None = None,
) -> list[dict[str, float]]:
    """Tune every TunableLinear of `student` layer by layer, codes fixed, as ApiQ (arXiv 2402.05147) does by blocks; or
    every L4QLinear, codes and all, as EfficientQAT (arXiv 2407.11062) does before it trains end to end: step sizes and
    offsets at `step_rate`.

    A layer reads what the tuned layers before it make, and is led to what the teacher's layer makes of the teacher's
    own input, so it also makes up for errors before it; one that gets worse is left as it was. `section`: whose
    settings these are. Returns {layer, before, after}: mean relative squared error of the layer's output, over all
    tokens. Raises StageError where it is not finite. Peak bytes: both streams', one batch's activations in one layer,
    four fp32 copies of what is tuned in it; on disk all hidden states twice.
    """
    log, generator = [], torch.Generator().manual_seed(seed)
    starts = Arguments(teacher, batches), Arguments(student, batches)
    with Scratch(folder) as hidden, reporter.progress("tuning blocks", len(student)) as advance:
        for number, batch in enumerate(batches):
            hidden.write(("teacher", number), teacher.start(batch.inputs).hidden)
            hidden.write(("student", number), student.start(batch.inputs).hidden)
        for index in range(len(student)):
            with teacher.layer(index) as layer, torch.no_grad():
                for number in range(len(batches)):
                    output = layer(hidden.read(("teacher", number), teacher.device), **starts[0].of(number, index))
                    hidden.write(("teacher", number), output)
            with student.layer(index) as layer:
                block = _Block(layer, hidden, starts[1], index, student.device)
                before = block.error(range(len(batches)))
                undo = block.tune(settings, step_rate, len(batches), generator)
                after = block.error(range(len(batches)))
                if not (math.isfinite(before) and math.isfinite(after)):
                    raise StageError(
                        f"{section}: the error of layer {index} is {before} and {after} once it is tuned; lower "
                        f"{section}.block_rate and run again"
                    )
                if after > before:
                    undo()
                    reporter.event(
                        "blocks",
                        f"layer {index} is left as it was: tuned, it is off by {after:.3g} instead of {before:.3g}; "
                        f"lower {section}.block_rate",
                    )
                    after = before
                block.advance(range(len(batches)))
                take(index, layer)
            log.append({"layer": index, "before": before, "after": after})
            advance(f"layer {index}")
    return log


class _Block:
    """One layer of the student, its inputs and the outputs it is led to."""

    def __init__(self, layer: nn.Module, hidden: Scratch, starts: Arguments, index: int, device: str) -> None:
        self._layer, self._hidden, self._starts, self._index, self._device = layer, hidden, starts, index, device

    def error(self, numbers: Sequence[int]) -> float:
        """Mean over the tokens of these batches."""
        with torch.no_grad():
            losses = [self._loss(number)[0].flatten() for number in numbers]
        return float(torch.cat(losses).double().mean())

    def tune(
        self, settings: Blocks, step_rate: float | None, count: int, generator: torch.Generator
    ) -> Callable[[], None]:
        """Adam over the batches in a drawn order, for so many epochs; its rates fall to zero along a cosine. Returns
        what puts everything back."""
        for module in self._layer.modules():
            if isinstance(module, TunableLinear | L4QLinear):
                module.tune()
        factors, steps = factors_and_steps(self._layer)
        groups: list[dict[str, Any]] = [{"params": factors}]
        if steps:
            groups.append({"params": steps, "lr": step_rate})
        first = [tensor.detach().clone() for tensor in (*factors, *steps)]
        optimizer = torch.optim.Adam(groups, lr=settings.block_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.block_epochs * count)
        for _ in range(settings.block_epochs):
            for number in torch.randperm(count, generator=generator).tolist():
                loss = self._loss(number)[0].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                for module in self._layer.modules():
                    if isinstance(module, L4QLinear):
                        module.clamp_steps_()

        def undo() -> None:
            with torch.no_grad():
                for tensor, value in zip((*factors, *steps), first, strict=True):
                    tensor.copy_(value)

        return undo

    def advance(self, numbers: Sequence[int]) -> None:
        """Leave what leaves the layer in place of what entered."""
        with torch.no_grad():
            for number in numbers:
                self._hidden.write(("student", number), self._loss(number)[1])

    def _loss(self, number: int) -> tuple[Tensor, Tensor]:
        """Squared error of each token relative to what is wanted, and the layer's output.

        Relative, because every reader of the residual stream normalises it: without that, the few tokens with massive
        activations would be all that counts.
        """
        arguments: dict[str, Any] = self._starts.of(number, self._index)
        output: Tensor = self._layer(self._hidden.read(("student", number), self._device), **arguments)
        wanted = self._hidden.read(("teacher", number), self._device)
        error = (output.float() - wanted.float()).square().sum(dim=-1)
        return error / wanted.float().square().sum(dim=-1).clamp(min=1e-12), output

"""Tuning a packed model block by block: each decoder layer to the original's output, on the tuned layers before it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_pipe.artifacts.scratch import Scratch
from qlora_pipe.config_training import Refine
from qlora_pipe.errors import StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.calibration import Arguments, CalibrationBatch
from qlora_pipe.hf.layers import LayerStream
from quant.tunable import TunableLinear

Take = Callable[[int, nn.Module], None]
"""Given the number of a tuned decoder layer and the layer, in order; it has no weights afterwards."""


def tune_blocks(
    teacher: LayerStream,
    student: LayerStream,
    batches: Sequence[CalibrationBatch],
    settings: Refine,
    take: Take,
    *,
    folder: Path,
    seed: int,
    reporter: Reporter,
) -> list[dict[str, float]]:
    """Tune every TunableLinear of `student` layer by layer, codes fixed, as ApiQ (arXiv 2402.05147) does by blocks.

    A layer reads what the tuned layers before it make, and is led to what the teacher's layer makes of the teacher's
    own input, so it also makes up for errors before it. Returns {layer, before, after}: mean relative squared error of
    the layer's output, over all tokens. Raises StageError where it is not finite. Peak bytes: both streams', one
    batch's activations in one layer, three fp32 copies of what is tuned in it; on disk all hidden states twice.
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
                block.tune(settings, len(batches), generator)
                after = block.advance(range(len(batches)))
                take(index, layer)
            log.append({"layer": index, "before": before, "after": after})
            advance()
    return log


class _Block:
    """One layer of the student, its inputs and the outputs it is led to."""

    def __init__(self, layer: nn.Module, hidden: Scratch, starts: Arguments, index: int, device: str) -> None:
        self._layer, self._hidden, self._starts, self._index, self._device = layer, hidden, starts, index, device

    def error(self, numbers: Sequence[int]) -> float:
        """Mean over the tokens of these batches."""
        with torch.no_grad():
            return self._mean([self._loss(number)[0] for number in numbers])

    def tune(self, settings: Refine, count: int, generator: torch.Generator) -> None:
        """Adam over the batches in a drawn order, for so many epochs; its rate falls to zero along a cosine."""
        for module in self._layer.modules():
            if isinstance(module, TunableLinear):
                module.tune()
        tuned = [parameter for parameter in self._layer.parameters() if parameter.requires_grad]
        steps = settings.block_epochs * count
        optimizer = torch.optim.Adam(tuned, lr=settings.block_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(settings.block_epochs):
            for number in torch.randperm(count, generator=generator).tolist():
                loss = self._loss(number)[0].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def advance(self, numbers: Sequence[int]) -> float:
        """As `error`; leaves what leaves the layer in place of what entered."""
        losses = []
        with torch.no_grad():
            for number in numbers:
                loss, output = self._loss(number)
                self._hidden.write(("student", number), output)
                losses.append(loss)
        return self._mean(losses)

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

    def _mean(self, losses: Sequence[Tensor]) -> float:
        mean = float(torch.cat([loss.flatten() for loss in losses]).double().mean())
        if not mean < float("inf"):
            raise StageError(
                f"refine: the error of layer {self._index} is {mean}; lower refine.block_rate and run again"
            )
        return mean

"""align: slot C, additive LoRA on generic text, which makes up for the structure that pruning removed.

It is the small model's alone: the full model has that structure, so recover drops it (LoRAM, arXiv 2502.13533, aligns
all weights of a dense small model instead).
"""

from functools import partial
from typing import Any

from qlora_pipe.config import Config
from qlora_pipe.hf.distill import summed_distillation, teacher_targets
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.training import SummedLoss
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import base_layers, pruned_model
from qlora_pipe.stages.train import fit_adapter, training_rows


def run(context: Context) -> None:
    """Peak bytes: the packed small model, slot C with its optimiser state, activations of one batch. With a teacher
    8 `top` bytes a token more, and before that those of `teacher_targets`, without the small model."""
    settings, dataset = context.config.align, context.config.data.calibration
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "align.enabled is false"})
        return
    loss: SummedLoss = summed_loss
    if settings.teacher == "original":
        chosen = training_rows(context, dataset, settings)
        targets = teacher_targets(base_layers(context), chosen, settings.top, context.reporter)
        loss = partial(summed_distillation, targets)
    fit_adapter(context, pruned_model(context, dense=False), dataset, settings, loss)


def _settings(config: Config) -> dict[str, Any]:
    if not config.align.enabled:
        return {"enabled": False}
    return computing(config) | config.align.model_dump(mode="json", exclude={"save_steps"})


STAGE = Stage(
    "align",
    1,
    ("source", "allocate", "prune"),
    _settings,
    run,
    lambda config: {"calibration": config.data.calibration} if config.align.enabled else {},
)

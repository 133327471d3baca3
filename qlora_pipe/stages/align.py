"""align: slot C, additive LoRA on generic text, which makes up for the structure that pruning removed.

It is the small model's alone: the full model has that structure, so recover drops it (LoRAM, arXiv 2502.13533, aligns
all weights of a dense small model instead).
"""

from typing import Any

from qlora_pipe.config import Config
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import pruned_model
from qlora_pipe.stages.train import fit_adapter


def run(context: Context) -> None:
    """Peak bytes: the packed small model, slot C with its optimiser state, activations of one batch."""
    settings = context.config.align
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "align.enabled is false"})
        return
    fit_adapter(context, pruned_model(context, dense=False), context.config.data.calibration, settings)


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

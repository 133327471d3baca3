"""A tiny run in which a model was trained, and that model: what it leaves is held against it."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import context_of
from torch import Tensor

from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.model import Model
from qlora_pipe.stages import train
from qlora_pipe.stages.base import Context

IDS = torch.arange(2 * 30).reshape(2, 30) * 13 % 256


@dataclass
class Trained:
    """What stages behind the last one see, the run folder, and the trained model itself."""

    seen: Context
    out: Path
    model: Model


def trained_run(config: Path, overrides: tuple[str, ...], stage: ModuleType = train) -> Trained:
    """The whole chain under these settings, and what was trained in `stage`."""
    settings, models = load(config, overrides), list[Model]()
    fit = stage.fit

    def fitted(context: Context, model: Model, *rest: Any, **more: Any) -> Any:
        models.append(model)
        return fit(context, model, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "fit", fitted)
        artifacts = compile_model(settings, Reporter(json_lines=True))
    # The last one: alignment trains before the task.
    return Trained(context_of(settings, artifacts), Path(str(settings.run)), models[-1])


def logits(model: torch.nn.Module) -> Tensor:
    """On IDS."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits

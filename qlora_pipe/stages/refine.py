"""refine: scales, levels and low-rank factors of the full decomposed model, tuned to the original's predictions."""

from functools import partial

from torch import nn

from qlora_pipe.config import Config
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import base_model, tunable_model
from qlora_pipe.stages.packing import write_packed_model
from qlora_pipe.stages.train import fit
from quant.tunable import TunableLinear


def run(context: Context) -> None:
    """End to end on calibration text, as RILQ (arXiv 2412.01129), codes fixed.

    Peak bytes: the original model, the packed one, four fp32 copies of what is tuned, and the activations of one batch.
    """
    settings = context.config.refine
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "refine.enabled is false"})
        return
    model, teacher = tunable_model(context), base_model(context)
    log = fit(context, model, context.config.data.calibration, settings, loss=partial(summed_divergence, teacher))
    names = [name for _, _, name in context.known.architecture.linears()]
    write_packed_model(context, ((name, _tuned(model, name).packed()) for name in names))
    context.write_json("history.json", log)


def _tuned(model: nn.Module, name: str) -> TunableLinear:
    module = model.get_submodule(name)
    assert isinstance(module, TunableLinear)
    return module


def _settings(config: Config) -> dict[str, object]:
    if not config.refine.enabled:
        return {"enabled": False}
    return computing(config) | config.refine.model_dump(mode="json", exclude={"save_steps"})


STAGE = Stage(
    "refine",
    1,
    ("source", "allocate", "decompose"),
    _settings,
    run,
    lambda config: {"calibration": config.data.calibration} if config.refine.enabled else {},
)

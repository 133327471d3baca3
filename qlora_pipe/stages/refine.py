"""refine: scales, levels and low-rank factors of the full decomposed model, tuned to the original's predictions."""

from functools import partial

from torch import nn

from qlora_pipe.config import Config
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import base_model, tunable_model
from qlora_pipe.stages.train import fit
from quant.tunable import TunableLinear


def run(context: Context) -> None:
    """End to end on calibration text, as RILQ (arXiv 2412.01129), codes fixed.

    Peak bytes: the original model, the packed one, four fp32 copies of what is tuned, and the activations of one batch.
    """
    settings, known = context.config.refine, context.known
    if not settings.enabled:
        context.write_json("skipped.json", {"reason": "refine.enabled is false"})
        return
    model, teacher = tunable_model(context), base_model(context)
    log = fit(context, model, context.config.data.calibration, settings, loss=partial(summed_divergence, teacher))
    with context.writer(known.decomposed()) as writer:
        for _, _, name in known.architecture.linears():
            for buffer, tensor in _tuned(model, name).packed().items():
                writer.write(f"{name}.{buffer}", tensor)
        for name in known.architecture.others():
            writer.write(name, context.base_reader.read(name))
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

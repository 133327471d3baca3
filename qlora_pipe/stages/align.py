"""align: slot C, additive LoRA on generic text, which makes up for the structure that pruning removed.

Where LoRAPrune's loop has trained it already, it goes on from there. It is the small model's alone: the full model has
that structure, so recover drops it (LoRAM, arXiv 2502.13533, aligns all weights of a dense small model instead).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from prune.scatter import restrict_adapter
from qlora_pipe.config import Config
from qlora_pipe.stages.base import Context, Stage, alike, computing
from qlora_pipe.stages.models import pruned_model
from qlora_pipe.stages.packing import read_factors, write_factors
from qlora_pipe.stages.train import fit_adapter, objective, training_rows


def run(context: Context) -> None:
    """Peak bytes: the packed small model, slot C with its optimiser state, activations of one batch, and what
    `objective` takes."""
    config, dataset = context.config, context.config.data.calibration
    guided = config.prune.method == "lora"
    if not config.align.enabled:
        if guided:
            _write_sliced(context)
        else:
            context.write_json("skipped.json", {"reason": "align.enabled is false"})
        return
    chosen = training_rows(context, dataset, config.align)
    loss = objective(context, chosen, config.align)
    start = _sliced(context) if guided else None
    fit_adapter(context, pruned_model(context, dense=False), chosen, config.align, loss, start)


def _sliced(context: Context) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Name of a linear map to what is left of its slot C, which was trained while groups were masked."""
    reader = context.reader("select", "adapter")
    places = {name: (layer, role) for layer, role, name in context.known.architecture.linears()}

    def factors(name: str) -> tuple[Tensor, Tensor]:
        layer, role = places[name]
        kept = context.index_map.kept_indices(layer, role)
        return restrict_adapter(*read_factors(reader.read, name), role, kept)

    return factors


def _write_sliced(context: Context) -> None:
    factors = _sliced(context)
    with context.writer(context.known.compensation(), stem="adapter") as writer:
        for _, _, name in context.known.small.linears():
            write_factors(writer, name, *factors(name))


def _settings(config: Config) -> dict[str, Any]:
    slot = {"enabled": False, "guided": config.prune.method == "lora"}
    if not config.align.enabled:
        return slot
    return slot | computing(config) | config.align.decisive()


STAGE = Stage(
    "align",
    1,
    ("source", "allocate", "select", "prune"),
    _settings,
    run,
    lambda config: {"calibration": config.data.calibration} if config.align.enabled else {},
    work=alike(run),
)

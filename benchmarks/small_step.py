"""One training step on the pruned model beside the same step on the full one, both packed, adapters on every map.

    python benchmarks/small_step.py [--short] [--json FILE] [--model smollm2|gemma3] [--calibration N]

A step is forward and backward of the summed loss on 4 rows of 256 tokens, without the optimiser. Its time is the median
of paired runs, and may fall short of the parameters' own ratio (embedding and head, which stay, counted) by a tenth.
Bytes are what is resident (packed maps, embedding, adapters with gradients and two moments) and what autograd keeps,
with the head's logits recomputed.
"""

import argparse
import math
from collections.abc import Iterator

import rows
import torch
from l4q_step import paired, sizes
from perplexity import SUBJECTS, context, heldout, setting, settings
from rows import Row

from qlora_pipe.architectures import Architecture
from qlora_pipe.compile import compile_model
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.ramp import Ramp
from qlora_pipe.hf.sequences import collate
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import full_packed_model, packed_modules, pruned_model

REDUCTIONS = (0.2, 0.5)
ROWS, LENGTH, RANK = 4, 256, 8
SLACK = 1.1


def adapted(model: Model) -> Model:
    generator = torch.Generator().manual_seed(0)
    for module in packed_modules(model).values():
        module.attach_adapter(RANK, 2 * RANK, generator)
    return model


def ramped(seen: Context, *, shrink: bool) -> Model:
    """The full model with what `select` did not keep masked, as LoRAPrune's loop has it."""
    model, layers = adapted(full_packed_model(seen)), seen.index_map.layers
    guide = seen.config.guide.model_copy(update={"shrink": shrink})
    counts = [(len(layer.kv_heads), len(layer.ffn)) for layer in layers]
    ramp = Ramp(packed_modules(model), seen.known.architecture.layers, guide, counts)
    for number, masks in ramp.masks.items():
        for kind, indices in (("kv", layers[number].kv_heads), ("ffn", layers[number].ffn)):
            masks[kind].zero_()[list(indices)] = 1
    ramp.load(ramp.state())
    return model


def parameters(architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in architecture.tensors().values())


def held_bytes(model: Model, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct storages that are there, or that one forward saves for backward."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    found = {}
    for tensor in (*model.parameters(), *model.buffers()):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = summed_loss(model, batch)
    del loss
    return sum(found.values()) + 3 * trained


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time and bytes at each true reduction of the blocks' parameters."""
    subject = SUBJECTS[arguments.model]
    batch = {name: tensor[:, :LENGTH] for name, tensor in collate(heldout(subject, ROWS)).items()}
    base = (*setting("decompose", budget="4bits", ranks=[0, 16]), *setting("export", small=False))
    for share in REDUCTIONS[1:] if arguments.short else REDUCTIONS:
        config = settings(subject, *base, *setting("prune", ratio=share), sequences=arguments.calibration)
        seen = context(config, compile_model(config, Reporter(), until="prune"))
        small, full = adapted(pruned_model(seen, dense=False)), adapted(full_packed_model(seen))
        ratio = parameters(seen.known.small) / parameters(seen.known.architecture)
        name = f"{subject.name}, {share:.0%} of the blocks gone ({ratio:.3f} of all parameters): small / full"
        steps = [lambda model=model: summed_loss(model, batch).backward() for model in (small, full)]
        yield paired(f"{name}, step seconds", *steps, SLACK * ratio, 3 if arguments.short else 9)
        yield sizes(f"{name}, bytes", held_bytes(small, batch), held_bytes(full, batch), 1.0)
        del small, full
        shrunk, masked = (ramped(seen, shrink=shrink) for shrink in (True, False))
        name = f"{subject.name}, {share:.0%} of the blocks masked (LoRAPrune's loop): left out / multiplied by zero"
        steps = [lambda model=model: summed_loss(model, batch).backward() for model in (shrunk, masked)]
        yield paired(f"{name}, step seconds", *steps, None, 3 if arguments.short else 9)
        yield sizes(f"{name}, bytes", held_bytes(shrunk, batch), held_bytes(masked, batch), None)


if __name__ == "__main__":
    options = rows.parser("A training step on the pruned model beside the full one.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--calibration", type=int, default=16, metavar="N", help="calibration rows of 512 tokens")
    given = options.parse_args()
    rows.show(measure(given), given.json)

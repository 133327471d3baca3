"""train: slot T, additive LoRA on the sliced Q + L1 L2 and slot C, on the packed base; or on the original weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from qlora_pipe import datasets, layouts
from qlora_pipe.architectures import Architecture
from qlora_pipe.config_data import Dataset
from qlora_pipe.config_training import Adapter, Optimisation, Taught, Tuning
from qlora_pipe.hf import ranks
from qlora_pipe.hf.distill import summed_distillation, teacher_targets
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.hf.training import SummedLoss, Watch, train
from qlora_pipe.stages.base import Context, Stage, alike, computing
from qlora_pipe.stages.models import adaptable_modules, base_layers, packed_map, packed_modules, task_model
from qlora_pipe.stages.packing import write_factors
from quant.baselines import LoRALinear
from quant.linear import PackedLinear


def run(context: Context) -> None:
    """Peak bytes: the small model, packed or dense, the adapter with its optimiser state, activations of one batch, and
    what `objective` takes."""
    settings = context.config.train
    chosen = task_rows(context, settings)
    loss = objective(context, chosen, settings)
    model = task_model(context, dense=False)
    if settings.low_rank == "trained":
        _fit_in_place(context, model, chosen, loss)
    else:
        fit_adapter(context, model, chosen, settings, loss)


def _fit_in_place(context: Context, model: Model, chosen: Sequence[Row], loss: SummedLoss) -> None:
    """Train L1 L2 itself, from where it is; write what it moved by, L1' L2' - L1 L2, as factors of twice the rank."""
    modules, reader = packed_modules(model), context.reader("prune")
    for module in modules.values():
        module.train_factors()
    log = fit(context, model, chosen, context.config.train, loss=loss)
    with context.writer(context.known.adapter(), stem="adapter") as writer:
        for layer, role, name in context.known.small.linears():
            left, right = packed_map(context, reader, "prune", layer, role).factors()
            task_a, task_b = modules[name].task_a, modules[name].task_b
            assert task_a is not None
            assert task_b is not None
            write_factors(writer, name, torch.cat([task_a.cpu(), right]), torch.cat([task_b.cpu(), -left], dim=1))
    context.write_json("history.json", log)


def fit_adapter(
    context: Context,
    model: Model,
    chosen: Sequence[Row],
    settings: Adapter,
    loss: SummedLoss = summed_loss,
    start: Callable[[str], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Train an adapter of every linear map of the small model on these rows; write its factors, and the log of the
    steps. `start` gives the factors A and B of the map of that name; without it A is random and B zero."""
    generator = torch.Generator().manual_seed(context.config.seed)
    modules = adaptable_modules(model)
    for name, module in modules.items():
        module.attach_adapter(settings.rank, settings.alpha, generator)
        if start is not None:
            lora_a, lora_b = start(name)
            module.load_state_dict({"task_a": lora_a, "task_b": lora_b}, strict=False)
    log = fit(context, model, chosen, settings, loss=loss)
    write_adapter(context, modules, context.known.small, settings.rank)
    context.write_json("history.json", log)


def write_adapter(
    context: Context, modules: Mapping[str, PackedLinear | LoRALinear], architecture: Architecture, rank: int
) -> None:
    """The factors of the adapters that are attached to linear maps."""
    with context.writer(layouts.adapter(architecture, rank), stem="adapter") as writer:
        for name, module in modules.items():
            assert module.task_a is not None
            assert module.task_b is not None
            write_factors(writer, name, module.task_a, module.task_b)


def fit(
    context: Context,
    model: Model,
    chosen: Sequence[Row],
    settings: Optimisation,
    step_rate: float | None = None,
    loss: SummedLoss = summed_loss,
    watch: Watch | None = None,
) -> list[dict[str, float]]:
    """Train what requires a gradient on these rows; the log of the steps."""
    return train(
        model,
        chosen,
        settings,
        work=context.work,
        seed=context.config.seed,
        device=context.config.device,
        reporter=context.reporter,
        step_rate=step_rate,
        loss=loss,
        watch=watch,
    )


def objective(context: Context, chosen: Sequence[Row], settings: Taught) -> SummedLoss:
    """What is asked of the small model on these rows: the text alone, or the original model's predictions too.

    Peak bytes, with a teacher: 8 `top` a token, and before that those of `teacher_targets`, which is why it is called
    before there is a small model.
    """
    if not settings.asks:
        return summed_loss
    asked = ranks.agree(
        lambda: teacher_targets(base_layers(context), chosen, settings.top, context.work, context.reporter)
    )
    return partial(summed_distillation, asked, settings.teacher_share)


def task_rows(context: Context, settings: Tuning) -> list[Row]:
    """Rows of the task's training part, packed if the settings say so."""
    return training_rows(context, context.config.data.task, settings, packing=settings.packing)


def training_rows(context: Context, dataset: Dataset, settings: Optimisation, *, packing: bool = False) -> list[Row]:
    """The first rows of the data set's training part, as many as all steps take; the user is told of what is left
    out, and of how often rows are seen again."""
    count = settings.steps * settings.batch_size * settings.accumulation
    found = rows(
        load_tokenizer(context.base),
        datasets.load(dataset, "train", context.config.seed),
        length=settings.length,
        count=count,
        name=dataset.source,
        packing=packing,
        tell=partial(context.reporter.event, "rows"),
    )
    if len(found) < count:
        context.reporter.event(
            "rows", f"{dataset.source}: {len(found)} rows for {count}, seen {count / len(found):.1f} times"
        )
    return found


def strength(context: Context) -> float:
    """alpha / rank of the trained adapter; a low-rank part trained in place has its scale in it."""
    if context.config.train.low_rank == "trained":
        return 1.0
    return context.config.train.alpha / context.config.train.rank


STAGE = Stage(
    "train",
    3,
    ("source", "allocate", "select", "prune", "align"),
    lambda config: computing(config) | config.train.decisive(),
    run,
    lambda config: {"task": config.data.task},
    work=alike(run),
)

"""train: slot T, additive LoRA on the sliced Q + L1 L2, on the packed base."""

import torch

from qlora_pipe import datasets, layouts
from qlora_pipe.hf.tokens import Row, load_tokenizer, rows
from qlora_pipe.hf.training import train
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import packed_modules, pruned_model


def run(context: Context) -> None:
    """Peak bytes: the packed small model, the adapter with its optimiser state, activations of one batch."""
    settings, config = context.config.train, context.config
    model = pruned_model(context, dense=False)
    generator = torch.Generator().manual_seed(config.seed)
    modules = packed_modules(model)
    for module in modules.values():
        module.attach_adapter(settings.rank, settings.alpha, generator)
    log = train(
        model,
        training_rows(context, settings.length, settings.steps * settings.batch_size * settings.accumulation),
        settings,
        work=context.work,
        seed=config.seed,
        device=config.device,
        reporter=context.reporter,
    )
    with context.writer(layouts.adapter(context.known.small, settings.rank), stem="adapter") as writer:
        for name, module in modules.items():
            assert module.task_a is not None
            assert module.task_b is not None
            writer.write(f"{name}.lora_A.weight", module.task_a)
            writer.write(f"{name}.lora_B.weight", module.task_b)
    context.write_json("history.json", log)


def training_rows(context: Context, length: int, count: int) -> list[Row]:
    """The first `count` rows of the task's training part."""
    dataset = context.config.data.task
    records = datasets.load(dataset, "train", context.config.seed)
    return rows(load_tokenizer(context.base), records, length=length, count=count, name=dataset.source)


def strength(context: Context) -> float:
    """alpha / rank of the trained adapter."""
    return context.config.train.alpha / context.config.train.rank


STAGE = Stage(
    "train",
    1,
    ("source", "allocate", "prune"),
    lambda config: computing(config) | config.train.model_dump(mode="json"),
    run,
    lambda config: {"task": config.data.task},
)

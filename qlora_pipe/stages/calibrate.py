"""calibrate: second moments of every linear map's inputs and output gradients, saved for any later budget."""

from qlora_pipe import datasets, layouts
from qlora_pipe.hf.calibration import collect
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import base_model


def run(context: Context) -> None:
    """One forward and backward pass of the base model over generic text."""
    settings, dataset = context.config.calibrate, context.config.data.calibration
    records = datasets.load(dataset, "train", context.config.seed)
    batch = rows(
        load_tokenizer(context.base),
        records,
        length=settings.length,
        count=settings.sequences,
        name=dataset.source,
    )
    names = [name for _, _, name in context.known.architecture.linears()]
    moments = collect(base_model(context), batch, names, context.reporter)
    with context.writer(layouts.moments(context.known.architecture), stem="moments") as writer:
        for name in names:
            writer.write(f"{name}.input", moments[name].column_weight().square())
            writer.write(f"{name}.gradient", moments[name].row_weight().square())
    scored = sum(row.scored for row in batch)
    context.write_json("calibration.json", {"sequences": len(batch), "tokens": scored})


STAGE = Stage(
    "calibrate",
    1,
    ("source",),
    lambda config: computing(config) | config.calibrate.model_dump(mode="json"),
    run,
    lambda config: {"calibration": config.data.calibration},
)

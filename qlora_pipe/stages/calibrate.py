"""calibrate: moments of every linear map's inputs and output gradients, saved for any later budget or pruning."""

from typing import Any

from qlora_pipe import datasets
from qlora_pipe.architectures import SITES, covariance_name
from qlora_pipe.hf.calibration import batches_of, covariance_sweep, gradient_sweep
from qlora_pipe.hf.sequences import Row
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.models import base_layers
from quant.moments import Covariance


def calibration_rows(context: Context, length: int, count: int, at_least: int = 1) -> list[Row]:
    """The first `count` rows of the calibration text, of at most `length` tokens; DataError below `at_least`."""
    dataset = context.config.data.calibration
    return rows(
        load_tokenizer(context.base),
        datasets.load(dataset, "train", context.config.seed),
        length=length,
        count=count,
        at_least=at_least,
        name=f"{dataset.source} (data.calibration)",
    )


def run(context: Context) -> None:
    """Two sweeps of the base model over generic text, layer by layer from disk.

    Peak bytes: embedding and head, and of one layer its weights, the activations of one batch and the covariances.
    """
    settings = context.config.calibrate
    found = calibration_rows(context, settings.length, settings.sequences, at_least=settings.sequences)
    stream, batches = base_layers(context), batches_of(found, context.config.device)
    gradients = gradient_sweep(stream, batches, context.work, context.reporter)
    norms = gradients.norms if settings.weighting == "gradient" else None
    layers: list[dict[str, Any]] = [
        {"gradient_scale": {site: float(gradients.norms[layer, site].double().mean()) for site in SITES}}
        for layer in range(len(stream))
    ]
    with context.writer(context.known.moments(), stem="moments") as writer:
        for name, moments in gradients.moments.items():
            writer.write(f"{name}.input", moments.column_weight().square())
            writer.write(f"{name}.gradient", moments.row_weight().square())
        for name, reader in gradients.readers.items():
            writer.write(f"{name}.mean", reader.mean())
            writer.write(f"{name}.gates", reader.gates.float())

        def keep(layer: int, covariances: dict[str, Covariance]) -> None:
            for site, covariance in covariances.items():
                writer.write(covariance_name(layer, site), covariance.triangle())
            layers[layer]["top_token_share"] = {site: each.top_share() for site, each in covariances.items()}

        if settings.covariance:
            covariance_sweep(stream, batches, norms, keep, context.work, context.reporter)
    context.write_json(
        "calibration.json",
        {
            "sequences": len(found),
            "tokens": sum(len(row.input_ids) for row in found),
            "scored": sum(row.scored for row in found),
            "weighting": settings.weighting,
            "layers": layers,
        },
    )


STAGE = Stage(
    "calibrate",
    3,
    ("source",),
    lambda config: computing(config) | config.calibrate.model_dump(mode="json"),
    run,
    lambda config: {"calibration": config.data.calibration},
)

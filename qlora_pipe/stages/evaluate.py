"""evaluate: perplexity of every model of the chain on held-out text."""

import json
from collections.abc import Iterator
from typing import Any

from qlora_pipe import datasets, layouts
from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.artifacts.layout import folder_files
from qlora_pipe.config_data import TASK
from qlora_pipe.errors import DataError
from qlora_pipe.hf.loss import score
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row, take
from qlora_pipe.hf.tokens import load_tokenizer, rows
from qlora_pipe.stages.base import Context, Stage, computing
from qlora_pipe.stages.compact import compact_model
from qlora_pipe.stages.models import (
    aligned_model,
    base_model,
    decomposed_model,
    pruned_model,
    task_model,
    with_adapter,
)
from qlora_pipe.stages.recover import heldout_rows
from qlora_pipe.stages.train import strength

_SHORTEST_ANSWER = 32


def run(context: Context) -> None:
    """One model at a time. Peak bytes: the full dense model, with the adapter, and the activations of 2048 tokens."""
    texts = _texts(context)
    (context.out / "heldout").mkdir()
    for name, chosen in texts.items():
        lines = (json.dumps({"input_ids": row.input_ids, "labels": row.labels}) for row in chosen)
        (context.out / "heldout" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    metrics = []
    sizes = _sizes(context)
    with context.reporter.progress("measuring perplexity", len(sizes) * len(texts)) as advance:
        for name, model in _models(context):
            for dataset, chosen in texts.items():
                found = score(model, chosen)
                metrics.append(
                    {
                        "model": name,
                        "dataset": dataset,
                        "perplexity": found.perplexity,
                        "loss": found.loss,
                        "tokens": found.tokens,
                        **sizes[name],
                    }
                )
                advance()
            del model
    context.write_json("metrics.json", metrics)


def _texts(context: Context) -> dict[str, list[Row]]:
    """Held-out rows by data set; of the task those that did not choose the recovery scale."""
    config = context.config
    settings = config.evaluate
    chosen_before = config.recover.rows
    held = heldout_rows(context, chosen_before + max(1, settings.tokens // _SHORTEST_ANSWER))[chosen_before:]
    if not held:
        raise DataError(f"{config.data.task.source}: no held-out row is left after recover.rows; give more records")
    texts = {TASK: take(held, settings.tokens)}
    tokenizer = load_tokenizer(context.base)
    for name, dataset in config.data.evaluation.items():
        records = datasets.load(dataset, "heldout", config.seed)
        count = max(1, settings.tokens // settings.length)
        found = rows(tokenizer, records, length=settings.length, count=count, name=dataset.source)
        texts[name] = take(found, settings.tokens)
    return texts


def _models(context: Context) -> Iterator[tuple[str, Model]]:
    """The models of the chain, one alive at a time."""
    yield "base", base_model(context)
    yield "decomposed", decomposed_model(context)
    yield "pruned", pruned_model(context)
    if context.config.compensates:
        yield "aligned", aligned_model(context)
    small = context.reader("train", "adapter")
    yield "trained-small", task_model(context, with_adapter(small.read, strength(context), context.dtype))
    if context.config.compact.enabled:
        yield "compact", compact_model(context)
    full = context.reader("recover", "adapter")
    factor = context.read_json("recover", "recovery.json")["scale"] * strength(context)
    adapted = with_adapter(full.read, factor, context.dtype)
    yield "full+recovered", base_model(context, adapted)
    yield "decomposed+recovered", decomposed_model(context, adapted)


def _sizes(context: Context) -> dict[str, dict[str, Any]]:
    """Bits per block weight (scales and low-rank factors counted) and bytes on disk of every model."""
    known = context.known
    places = read_folder(context.base)
    base = {name: place.spec for name, place in places.items()}
    base_file = sum(path.stat().st_size for path in {place.file for place in places.values()})
    adapter = known.files("train")
    full_adapter = sum(folder_files(known.full_adapter(), stem="adapter").values())

    def size(tensors: layouts.Tensors, files: int, weights: int, extra: int = 0) -> dict[str, Any]:
        bits = 8 * (layouts.linear_bytes(tensors, known.architecture) + extra) / weights
        return {"bits_per_weight": bits, "bytes": files}

    full, small = known.architecture.linear_weights(), known.small.linear_weights()
    decomposed, pruned = sum(known.files(known.full_packed).values()), sum(known.files("prune").values())
    aligned, slot = known.files("align"), layouts.tensor_bytes(known.outputs("align").get("adapter", {}))
    extra_small = layouts.tensor_bytes(known.adapter()) + slot
    trained_on, trained_files = known.pruned(), pruned + sum((*aligned.values(), *adapter.values()))
    if context.config.train.base == "original":
        trained_on = layouts.dense(known.small, context.config.dtype)
        trained_files += sum(folder_files(trained_on).values()) - pruned
    extra_full = layouts.tensor_bytes(known.full_adapter())
    found = {
        "base": size(base, base_file, full),
        "decomposed": size(known.decomposed(), decomposed, full),
        "pruned": size(known.pruned(), pruned, small),
        "trained-small": size(trained_on, trained_files, small, extra_small),
    }
    if aligned:
        found["aligned"] = size(known.pruned(), pruned + sum(aligned.values()), small, slot)
    if context.config.compact.enabled:
        beside = known.compact_adapter() if context.config.compact.method == "qat-lora" else {}
        files = sum((*folder_files(known.integers()).values(), *folder_files(beside, stem="adapter").values()))
        found["compact"] = size(known.integers(), files, small, layouts.tensor_bytes(beside))
    found["full+recovered"] = size(base, base_file + full_adapter, full, extra_full)
    found["decomposed+recovered"] = size(known.decomposed(), decomposed + full_adapter, full, extra_full)
    return found


STAGE = Stage(
    "evaluate",
    3,
    ("source", "allocate", "decompose", "refine", "select", "prune", "align", "train", "compact", "recover"),
    lambda config: (
        computing(config)
        | config.evaluate.model_dump(mode="json")
        | {"recover_rows": config.recover.rows, "alpha": config.train.alpha}
        | {"compact": config.compact.enabled}
    ),
    run,
    lambda config: {TASK: config.data.task} | config.data.evaluation,
)

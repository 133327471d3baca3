"""What is left of fine-tuning in few bits: every method on the same rows of a task, for as many steps.

    python benchmarks/tuning.py [--short] [--json FILE] [--model smollm2|gemma3|stories260k] [--bits 2,3,4]
        [--group_sizes 64] [--seeds 0,1,2] [--methods NAMES] [--rates 1,4] [--steps 64] [--rows 64]
        [--calibration N]

A method is a file of examples/baselines, nothing pruned, at the bits and group size that are asked for: of integers
those of `compact`; of packed bases that have one configuration its width; of others a budget of half a bit more. Where
integers start from a trained adapter, half of the steps train that and half the integers; all see `--steps` batches of
4 rows. `ours` and `l4q` are ours, the first with our first codes and warm start, the second as published; lsq, qa-lora
and the two ptq end as integers too, qat-lora and those on packed bases keep an adapter or a low-rank part beside them.
A budget that a method cannot meet is named on standard error and left out. Learning rates are those of the files times
each of `--rates`, and every method is shown at its best: a table at one rate says more of the rate than of methods.

The task is the example's (questions, of which only the answers are scored), or GSM8K if the environment names its
training part in QLORA_PIPE_GSM8K, {question, answer} a line; stories260k has its own stories. A seed draws adapters,
the rows that are trained on and those that are held out. In brackets: bits per block weight, everything counted in the
precision it is kept in while it trains, steps and adapters in 32 bits. Ratio is held-out perplexity over that of LoRA
on the original weights at the same seed, spread its standard deviation over seeds (0 for one); the last row of each
width and group size is the better of ours over the best other integer method.
"""

import argparse
import math
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import rows
from perplexity import SUBJECTS, Subject, context, setting
from rows import Row

from qlora_pipe import layouts
from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.errors import BudgetError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.compact import compact_model
from qlora_pipe.stages.models import base_model, task_model, with_adapter
from qlora_pipe.stages.recover import heldout_rows
from qlora_pipe.stages.train import strength

FILES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "examples/baselines").glob("*.yaml"))}
REFERENCE = "lora"
OURS = ("ours", "l4q")
INTEGERS = ("lsq", "qa-lora", "ptq-nearest", "ptq-feedback")
GSM8K = "QLORA_PIPE_GSM8K"
GROUP_SIZES = {"stories260k": 4}
"""Where 64 does not divide the inputs of every linear map."""


def gsm8k() -> tuple[str, ...]:
    """Overrides for the task, if the environment names GSM8K."""
    path = os.environ.get(GSM8K)
    return setting("data.task", source=path, prompt="{question}", response="{answer}", exclude=[]) if path else ()


def task(subject: Subject) -> tuple[str, ...]:
    """Overrides for the model and what it is trained on."""
    return subject.overrides() if subject.name == "stories260k" else (*subject.overrides(), *gsm8k())


def shared(config: Config, steps: int) -> tuple[str, ...]:
    """Overrides that give the method `steps` in all; an adapter that nothing starts from is trained for one."""
    settings = config.compact
    if not settings.enabled or not settings.steps:
        return setting("train", steps=steps)
    before = steps // 2 if settings.warm_start else 0
    return (*setting("train", steps=max(1, before)), *setting("compact", steps=steps - before))


def faster(config: Config, factor: float) -> tuple[str, ...]:
    """Overrides that multiply every learning rate."""
    integers = {key: factor * getattr(config.compact, key) for key in ("learning_rate", "step_rate")}
    return (*setting("train", learning_rate=factor * config.train.learning_rate), *setting("compact", **integers))


def configured(
    name: str, subject: Subject, bits: int, group_size: int, given: argparse.Namespace, seed: int, factor: float
) -> Config:
    """A method's file under what is measured."""
    path, own = FILES[name], [f"run=runs/bench-{subject.name}", f"seed={seed}"]
    config = load(path)
    own += setting("calibrate", sequences=given.calibration)
    if len(config.decompose.bits) == 1:
        own += setting("decompose", bits=[bits])
    else:
        own += setting("decompose", budget=f"{bits + 0.5}bits")
        if subject.ranks:
            least = 1 if config.train.low_rank == "trained" else 0
            own += setting("decompose", ranks=[rank for rank in subject.ranks if rank >= least])
    if config.compact.enabled:
        own += setting("compact", bits=bits, group_size=group_size)
    return load(path, (*task(subject), *own, *shared(config, given.steps), *faster(config, factor)))


class Measured(NamedTuple):
    """Mean loss on held-out rows of what a method trains, and of the original model; bits per block weight, with steps,
    offsets, scales, low-rank parts and adapters."""

    loss: float
    untrained: float
    bits: float


def stored_bits(seen: Context) -> float:
    """Of the trained model, everything counted."""
    config, known = seen.config, seen.known
    if config.compact.enabled:
        tensors = known.integers() | (known.compact_adapter() if config.compact.method == "qat-lora" else {})
    else:
        dense = config.train.base == "original"
        tensors = (layouts.dense(known.small, config.dtype) if dense else known.pruned()) | known.adapter()
    return 8 * layouts.linear_bytes(tensors, known.small) / known.small.linear_weights()


def measured(config: Config, count: int) -> Measured:
    """Compile as far as the method trains, and score what it is then."""
    artifacts = compile_model(config, Reporter(), until="compact" if config.compact.enabled else "train")
    seen = context(config, artifacts)
    held = heldout_rows(seen, count)
    before = score(base_model(seen), held).loss
    if config.compact.enabled:
        trained = compact_model(seen)
    else:
        adapter = seen.reader("train", "adapter")
        trained = task_model(seen, with_adapter(adapter.read, strength(seen), seen.dtype))
    after = score(trained, held).loss
    for stage in ("train", "compact"):
        if stage in artifacts:
            shutil.rmtree(artifacts[stage].folder)
    return Measured(after, before, stored_bits(seen))


def compared(measure: str, ours: Sequence[float], peer: Sequence[float], bar: float | None) -> Row:
    """Perplexity ours / peer from the mean difference of the losses, a seed each; spread is the deviation of these."""
    differences = [a - b for a, b in zip(ours, peer, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    spread = ratio * statistics.stdev(differences) if len(differences) > 1 else 0.0
    values = math.exp(statistics.fmean(ours)), math.exp(statistics.fmean(peer))
    holds = None if bar is None else ratio < bar
    return Row(measure, *values, ratio, "-" if bar is None else f"< {bar:g}", holds, spread)


def best_rows(place: str, found: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """The better of ours beside the best of the other integer methods."""
    sides = [{name: loss for name, loss in found.items() if name in group} for group in (OURS, INTEGERS)]
    if all(sides):
        ours, other = (min(side, key=lambda name: statistics.fmean(side[name])) for side in sides)
        yield compared(f"{place}: {ours} / best other integers ({other})", found[ours], found[other], 1.0)


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """LoRA over the untrained model, then a row a method and the summary of each width and group size."""
    subject = SUBJECTS[given.model]
    names = given.methods.split(",") if given.methods else [name for name in FILES if name != REFERENCE]
    if set(names) - set(FILES):
        raise SystemExit(f"--methods: expected some of {', '.join(FILES)}, found {given.methods}")
    widths, seeds = (given.bits or ("3" if given.short else "2,3,4")), [int(seed) for seed in given.seeds.split(",")]
    sizes = given.group_sizes or str(GROUP_SIZES.get(subject.name, 64))

    def by_seed(name: str, bits: int, size: int) -> list[Measured]:
        """At the rates that are best on average."""
        tried = [
            [measured(configured(name, subject, bits, size, given, seed, factor), given.rows) for seed in seeds]
            for factor in map(float, given.rates.split(","))
        ]
        return min(tried, key=lambda seen: statistics.fmean(one.loss for one in seen))

    lora, untrained, _ = zip(*by_seed(REFERENCE, 3, 0), strict=True)
    yield compared(f"{subject.name}: {REFERENCE} / untrained", lora, untrained, None)
    for size in map(int, sizes.split(",")):
        for bits in map(int, widths.split(",")):
            place, found = f"{subject.name}, {bits} bits, groups of {size}", dict[str, list[float]]()
            for name in names:
                try:
                    seen = by_seed(name, bits, size)
                except BudgetError as error:
                    print(f"{name} at {bits} bits: {error}", file=sys.stderr)
                    continue
                found[name] = [one.loss for one in seen]
                yield compared(f"{place}: {name} ({seen[0].bits:.2f}) / {REFERENCE}", found[name], lora, None)
            yield from best_rows(place, found)


if __name__ == "__main__":
    options = rows.parser("Held-out perplexity of a task, by how few bits were trained for it.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--bits", metavar="BITS", help="separated by commas (default 2,3,4, short 3)")
    options.add_argument("--group_sizes", metavar="SIZES", help="weights a step of integers, separated by commas")
    options.add_argument("--seeds", default="0", metavar="SEEDS", help="separated by commas")
    options.add_argument("--methods", metavar="NAMES", help="files of examples/baselines, separated by commas")
    options.add_argument("--rates", default="1", metavar="FACTORS", help="of all learning rates; the best is shown")
    options.add_argument("--steps", type=int, default=64, metavar="N", help="optimiser steps of every method")
    options.add_argument("--rows", type=int, default=64, metavar="N", help="held-out rows")
    options.add_argument("--calibration", type=int, default=16, metavar="N", help="calibration rows of 512 tokens")
    arguments = options.parse_args()
    rows.show(measure(arguments), arguments.json)

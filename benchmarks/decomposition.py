"""Perplexity of decomposed models on held-out text: ours beside plain NormalFloat and beside a uniform choice.

    python benchmarks/decomposition.py [--short] [--json FILE]

Settings are those of examples/smollm2.yaml. Every pair has equal code bits (plain) or equal bytes (uniform); ratio is
perplexity ours / peer, from the mean difference of log-likelihood per token; spread is its standard error over rows.
Scores and calibration are shared between the models through one run folder, runs/bench-decomposition.
"""

import json
import math
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import rows
from rows import Row

from qlora_pipe import datasets
from qlora_pipe.allocation import read_allocation
from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score
from qlora_pipe.hf.tokens import load_tokenizer
from qlora_pipe.hf.tokens import rows as token_rows
from qlora_pipe.plan import know
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import base_model, decomposed_model

CONFIG = Path(__file__).parent.parent / "examples/smollm2.yaml"
RUN = "runs/bench-decomposition"
LENGTH = 512
UNIFORM = ("decompose.budget=32bits", "decompose.block_sizes=[64]")


def settings(*overrides: str) -> Config:
    return load(CONFIG, (f"run={RUN}", *overrides))


def context(config: Config) -> tuple[Context, float]:
    """The decomposed model's context, and its bits per block weight."""
    artifacts = compile_model(config, Reporter(), until="decompose")
    body = json.loads((artifacts["allocate"].folder / "allocation.json").read_text())
    base = (Path(RUN) / "base").resolve()
    known = know(config, base).with_allocation(read_allocation(body))
    place = Path(RUN)
    made = Context(config=config, known=known, base=base, inputs=artifacts, out=place, work=place, reporter=Reporter())
    return made, body["bits_per_weight"]


@cache
def heldout(count: int) -> list[object]:
    """Windows of the held-out part of the generic text."""
    dataset = settings().data.evaluation["c4"]
    records = datasets.load(dataset, "heldout", 0)
    tokenizer = load_tokenizer((Path(RUN) / "base").resolve())
    return list(token_rows(tokenizer, records, length=LENGTH, count=count, name=dataset.source))


def losses(made: Context, count: int, *, base: bool = False) -> list[float]:
    """Mean loss of each window."""
    model = base_model(made) if base else decomposed_model(made)
    return [score(model, [row]).loss for row in heldout(count)]  # type: ignore[list-item]


def compare(measure: str, ours: list[float], peer: list[float], bar: float) -> Row:
    difference = [a - b for a, b in zip(ours, peer, strict=True)]
    ratio = math.exp(statistics.fmean(difference))
    error = ratio * statistics.stdev(difference) / math.sqrt(len(difference))
    values = math.exp(statistics.fmean(ours)), math.exp(statistics.fmean(peer))
    return Row(measure, *values, ratio, f"< {bar:g}", ratio < bar, error)


def measure(short: bool) -> Iterator[Row]:
    """3-bit codes with and without the low-rank part; allocated against two uniform choices at their bytes."""
    count = 4 if short else 12
    low, _ = context(settings(*UNIFORM, "decompose.bits=[3]", "decompose.ranks=[16]"))
    with_rank = losses(low, count)
    plain, _ = context(settings(*UNIFORM, "decompose.bits=[3]", "decompose.ranks=[0]"))
    yield compare("NF3 block 64 + rank 16 / plain NF3 block 64", with_rank, losses(plain, count), 1.0)
    nf4, _ = context(settings(*UNIFORM, "decompose.bits=[4]", "decompose.ranks=[0]"))
    for name, made, peer in (("NF3 rank 16", low, with_rank), ("plain NF4", nf4, losses(nf4, count))):
        budget = sum(made.known.files("decompose").values())
        chosen, bits = context(settings(f"decompose.budget={budget}B"))
        assert sum(chosen.known.files("decompose").values()) <= budget
        ours = losses(chosen, count)
        yield compare(f"allocated / uniform {name}, equal bytes ({bits:.3f} bits)", ours, peer, 1.0)
    unquantised = losses(nf4, count, base=True)
    yield compare("plain NF4 block 64 / unquantised", peer, unquantised, math.inf)


if __name__ == "__main__":
    rows.run("Perplexity of decomposed models beside plain and uniform quantisation.", measure)

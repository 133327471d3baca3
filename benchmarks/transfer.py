"""What of fine-tuning survives the way through a small model: pruned, in few bits, or both.

    python benchmarks/transfer.py [--short] [--json FILE] [--model smollm2|gemma3|stories260k]
        [--reductions 0.2,0.3,0.5] [--bits 4,3] [--steps 32] [--align 16] [--rate 5e-4] [--rows 48] [--calibration N]

Every reduction is a number of bytes: those of the packed maps of a model in 4 bits, of which that share is gone. They
are spent on each of `--bits`, with as much of the blocks gone as that takes (true reduction, widths of each layer
allocated), and on the whole model in fewer bits. Then slot C learns generic text from the original for `--align` steps
and an adapter the task for `--steps`, 4 rows of 256 tokens each; the adapter alone is put on the original model, at the
scale that is best on rows of their own, corrected for what rounding changed (EMLoC) if that is better there. Direct is
the same adapter trained on the original weights, at its best scale. Share kept is (L - L recovered) / (L - L direct) of
the original's loss L; `of the small one's own` is LoRAM's ratio, with what the small model gained below.

Task: questions of which the answers are scored, the example's, or GSM8K if the environment names its training part in
QLORA_PIPE_GSM8K, {question, answer} a line. Rows that choose the scale, and rows that are trained on, are not measured.
Ratio is held-out perplexity over the original's, spread its standard error over groups of rows. A budget that cannot be
met is named on standard error and left out.
"""

import argparse
import math
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import rows
from perplexity import SUBJECTS, compare, context, mean_and_error, setting, settings
from rows import Row
from tuning import gsm8k

from qlora_pipe import layouts
from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.errors import BudgetError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row as Tokens
from qlora_pipe.memory import RUNTIME_BYTES, peak_bytes
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import aligned_model, base_model, pruned_model, task_model, with_adapter
from qlora_pipe.stages.recover import heldout_rows
from qlora_pipe.stages.train import strength

REDUCTIONS = (0.2, 0.3, 0.5)
WIDEST = 4.0
"""Bits a weight, everything counted, of which a reduction is a share."""
BATCH = {"batch_size": 4, "length": 256}
GROUPS = 8
"""Held-out rows are scored in so many groups, for the standard error."""


class Seen(NamedTuple):
    """Losses by group of held-out rows of the small model, before and after training, and of the full one with the
    recovered adapter; the scale of that, and the losses at the best scale, corrected or not, on the rows that choose;
    bits of the small model's packed maps for each block weight of the original; bytes that training takes beside the
    libraries, as planned."""

    before: list[float]
    after: list[float]
    recovered: list[float]
    scale: float
    corrections: dict[str, float]
    bits: float
    planned: int


def losses(model: Model, held: Sequence[Sequence[Tokens]]) -> list[float]:
    """Mean loss of each group of rows."""
    return [score(model, group).loss for group in held]


def heldout(seen: Context, count: int) -> list[list[Tokens]]:
    """Groups of the rows that come after those that choose the scale."""
    passed = seen.config.recover.rows
    found = heldout_rows(seen, passed + count)[passed:]
    return [found[start::GROUPS] for start in range(GROUPS)]


def untrained(config: Config, count: int) -> list[float]:
    """Losses of the original model."""
    seen = context(config, compile_model(config, Reporter(), until="source"))
    return losses(base_model(seen), heldout(seen, count))


def through_small(config: Config, count: int) -> Seen:
    """Train on a small model, recover, and score."""
    artifacts = compile_model(config, Reporter(), until="recover")
    seen = context(config, artifacts)
    held, known = heldout(seen, count), seen.known
    before = losses((aligned_model if config.compensates else pruned_model)(seen), held)
    small = with_adapter(seen.reader("train", "adapter").read, strength(seen), seen.dtype)
    after = losses(task_model(seen, small), held)
    recovery = seen.read_json("recover", "recovery.json")
    tried = {found["correction"]: min(found["loss_by_scale"].values()) for found in (recovery, *recovery["rejected"])}
    scale = recovery["scale"]
    adapter = with_adapter(seen.reader("recover", "adapter").read, scale * strength(seen), seen.dtype)
    recovered = losses(base_model(seen, adapter), held)
    bits = 8 * layouts.linear_bytes(known.pruned(), known.small) / known.architecture.linear_weights()
    for stage in ("select", "prune", "align", "train", "recover"):
        shutil.rmtree(artifacts[stage].folder)
    return Seen(before, after, recovered, scale, tried, bits, peak_bytes("train", known)[0] - RUNTIME_BYTES)


def share_row(
    measure: str, base: Sequence[float], ours: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> Row:
    """What `ours` gains on `base`, over what `after` gains on `before`; perplexities are of `ours` and `after`."""
    gained, error = mean_and_error([a - b for a, b in zip(base, ours, strict=True)])
    whole = statistics.fmean(before) - statistics.fmean(after)
    perplexities = math.exp(statistics.fmean(ours)), math.exp(statistics.fmean(after))
    return Row(measure, *perplexities, gained / whole, "-", None, error / abs(whole))


def design_rows(place: str, seen: Seen, base: Sequence[float], best: Sequence[float]) -> Iterator[Row]:
    """What one design says; `best` are the losses of direct tuning."""
    yield compare(f"{place}: small, before / original", seen.before, base, None)
    yield compare(f"{place}: small, trained / original", seen.after, base, None)
    yield compare(f"{place}: recovered at {seen.scale:g} / original", seen.recovered, base, None)
    if "emloc" in seen.corrections:
        corrected, plain = (math.exp(seen.corrections[name]) for name in ("emloc", "none"))
        yield Row(f"{place}: corrected / not, where it is chosen", corrected, plain, corrected / plain, "-", None, 0)
    yield share_row(f"{place}: share of direct's gain that is kept", base, seen.recovered, base, best)
    yield share_row(f"{place}: share of the small one's own", base, seen.recovered, seen.before, seen.after)


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """Direct tuning, then five rows a reduction and design, and what training each takes."""
    subject = SUBJECTS[given.model]
    tuned = setting("train", rank=8, alpha=16, learning_rate=given.rate, steps=given.steps, **BATCH)
    recover = setting("recover", scales=[0.5, 1.0, 1.5, 2.0], rows=24)
    corrected = setting("recover", correction="emloc")
    aligned = setting("align", enabled=True, steps=given.align, **BATCH)

    def chosen(budget: float, *overrides: str) -> Config:
        own = (*setting("decompose", budget=f"{budget:.9f}bits"), *gsm8k(), *tuned, *recover)
        return settings(subject, *own, *overrides, sequences=given.calibration)

    direct = through_small(chosen(WIDEST, *setting("train", base="original")), given.rows)
    base, best = untrained(chosen(WIDEST), given.rows), direct.recovered
    yield compare(f"{subject.name}: LoRA on the original, at {direct.scale:g} / original", best, base, None)
    # Of a tiny model the feed-forward widths are no multiples of 64.
    widths = setting("prune", widths="allocated", align=4 if subject.ranks else 64)
    shares = [float(text) for text in given.reductions.split(",")] if given.reductions else REDUCTIONS
    for share in shares[:1] if given.short else shares:
        total = WIDEST * (1 - share)
        for bits in (*(bits for bits in map(float, given.bits.split(",")) if bits > total), total):
            gone = 1 - total / bits
            removed = (*widths, *setting("prune", ratio=gone)) if gone else ()
            place = f"{subject.name}, {share:.0%}: {bits:.4g} bits, {gone:.0%} gone"
            try:
                seen = through_small(chosen(bits, *aligned, *removed, *corrected), given.rows)
            except BudgetError as error:
                print(f"{place}: {error}", file=sys.stderr)
                continue
            yield from design_rows(f"{place} ({seen.bits:.3f})", seen, base, best)
            yield Row(f"{place}: training as planned, MB", seen.planned / 1e6, None, None, "-", None, 0)


if __name__ == "__main__":
    options = rows.parser("What of fine-tuning survives the way through a small model, by the small model's design.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--reductions", metavar="SHARES", help="of the blocks' parameters, separated by commas")
    options.add_argument("--bits", default="4,3", metavar="BITS", help="of pruned models, separated by commas")
    options.add_argument("--steps", type=int, default=32, metavar="N", help="training steps on the task")
    options.add_argument("--align", type=int, default=16, metavar="N", help="training steps of slot C")
    options.add_argument("--rate", type=float, default=5e-4, metavar="RATE", help="peak learning rate of the task")
    options.add_argument("--rows", type=int, default=48, metavar="N", help="held-out rows")
    options.add_argument("--calibration", type=int, default=16, metavar="N", help="calibration rows of 512 tokens")
    given = options.parse_args()
    rows.show(measure(given), given.json)

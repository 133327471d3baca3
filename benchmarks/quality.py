"""Perplexity at equal bits: ours beside the published ways to fit weights into a budget.

    python benchmarks/quality.py [--short] [--json FILE] [--model smollm2|gemma3|stories260k] [--budgets 2.5,2.75]
        [--methods ours,lq] [--windows N] [--calibration N]

Every method is the same pipeline under other settings, with the same calibration rows and the same total bits per block
weight (codes, scales, levels and low-rank factors, all counted) spent by the same integer programme over an error table
that is estimated under the method's own metric. Text and models: benchmarks/perplexity.py.

LQ-LoRA (lq, lq-fisher) and LoftQ have NF levels and low-rank factors of 8 bits, as LQ-LoRA stores them. Its 243
configurations have rank 64, which in 8 bits is 1.2 bits a weight of matrices as small as these: 2.5 to 3 bits in all
could not be met. So the three are offered ranks 4, 8 and 16 (stories260k: 1, 2, 4), 2 to 4 bits, blocks of 32 or 64
with 8-bit scales and one superblock a row. LQ-LoRA's loop stops as published, but after 20 iterations at most; LoftQ's
makes 5. GPTQ has integers with a zero point in groups of 64 or 128: SmolLM2's weights come from a 4-bit grid in groups
of 32, on which a quantiser would look lossless.

Names with +refine are tuned on 48 rows of 256 calibration tokens, end to end, codes fixed: ours, and the two that have
something to gain from it, scales and factors (lq-fisher) or scales alone (gptq).

Ratio is perplexity over that of the unquantised model, spread its standard error over windows. After each budget, for
untuned and for tuned methods: ours over the lowest of the others, and how much of the distance in log-perplexity
between the better LQ-LoRA and the unquantised model ours closes. A budget that a method cannot meet is named on
standard error and left out.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

import rows
from perplexity import SUBJECTS, base_losses, compare, heldout, losses, mean_and_error, setting, settings
from rows import Row

from qlora_pipe.errors import BudgetError

BUDGETS = (2.5, 2.75, 3.0, 3.5, 4.0)
LQ = ("lq", "lq-fisher")
CLOSED = 0.5
"""Share of the distance to the unquantised model that is to be closed at the budgets of CLOSED_AT."""
CLOSED_AT = (2.75, 3.0)
REFINED = ("lq-fisher", "gptq", "ours")
"""What is also measured with its scales, levels and factors tuned, all on the same tokens."""
REFINE = setting("refine", enabled=True, steps=48, length=256)
TUNED = "+refine"


def methods(ranks: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """Overrides of the configuration by name of the method; `ranks` is what published low-rank parts may have."""
    nf = {"grids": ["nf"], "metric": "none", "rounding": "nearest", "scale_search": False}
    low_rank = {
        "ranks": ranks,
        "bits": [2, 3, 4],
        "block_sizes": [32, 64],
        "scale_bits": [8],
        "scale_dtypes": ["bfloat16"],
        "superblocks": ["row"],
        "factor_dtype": "int8",
        "table": "estimated",
    }
    lq = {"method": "lq", "iterations": 20} | low_rank
    gptq = {"grids": ["uint"], "block_sizes": [64, 128], "ranks": [0], "loss_scale": False, "scale_search": False}
    found = {
        "nf+ilp": setting("decompose", **nf, ranks=[0]),
        "loftq": setting("decompose", **nf | low_rank, start="quantize", iterations=5),
        "lq": setting("decompose", **lq, metric="none"),
        "lq-fisher": setting("decompose", **lq, metric="fisher"),
        "gptq": (*setting("decompose", **gptq), *setting("calibrate", weighting="none")),
        "ours": (),
    }
    return found | {f"{name}{TUNED}": (*found[name], *REFINE) for name in REFINED}


def budget_rows(budget: float, found: Mapping[str, Sequence[float]], base: Sequence[float]) -> Iterator[Row]:
    """What one budget's losses say of ours, untuned beside untuned methods and tuned beside tuned ones."""
    for tuned in ("", TUNED):
        alike = {name: loss for name, loss in found.items() if name.endswith(TUNED) == bool(tuned)}
        ours = alike.pop(f"ours{tuned}", None)
        if ours is None or not alike:
            continue
        best = min(alike, key=lambda other: statistics.fmean(alike[other]))
        yield compare(f"{budget:g} bits: ours{tuned} / lowest other ({best})", ours, alike[best], 1.0)
        published = [alike[f"{name}{tuned}"] for name in LQ if f"{name}{tuned}" in alike]
        if published:
            best_lq = min(published, key=statistics.fmean)
            gap = statistics.fmean(best_lq) - statistics.fmean(base)
            closed, error = mean_and_error([a - b for a, b in zip(best_lq, ours, strict=True)])
            bar = f">= {CLOSED:g}" if budget in CLOSED_AT else "-"
            holds = closed / gap >= CLOSED if budget in CLOSED_AT else None
            yield Row(
                f"{budget:g} bits: share of the gap best LQ-LoRA - unquantised that ours{tuned} closes",
                math.exp(statistics.fmean(ours)),
                math.exp(statistics.fmean(best_lq)),
                closed / gap,
                bar,
                holds,
                error / gap,
            )


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """One row a budget and method, and each budget's summary."""
    subject = SUBJECTS[arguments.model]
    windows = heldout(subject, arguments.windows or (4 if arguments.short else 12))
    known = methods([rank for rank in subject.ranks if rank] if subject.ranks else [4, 8, 16])
    names = arguments.methods.split(",") if arguments.methods else list(known)
    if set(names) - set(known):
        raise SystemExit(f"--methods: expected some of {', '.join(known)}, found {arguments.methods}")
    budgets = [float(text) for text in arguments.budgets.split(",")] if arguments.budgets else BUDGETS
    base = base_losses(settings(subject), windows)
    for budget in budgets[1:2] if arguments.short and not arguments.budgets else budgets:
        found: dict[str, list[float]] = {}
        for name in names:
            chosen = (*known[name], *setting("decompose", budget=f"{budget:g}bits"))
            try:
                found[name], body = losses(settings(subject, *chosen, sequences=arguments.calibration), windows)
            except BudgetError as error:
                print(f"{name} at {budget:g} bits: {error}", file=sys.stderr)
                continue
            measure = f"{subject.name}, {budget:g} bits ({body['bits_per_weight']:.4f}): {name} / unquantised"
            yield compare(measure, found[name], base, None)
        yield from budget_rows(budget, found, base)


if __name__ == "__main__":
    options = rows.parser("Perplexity of ours beside published methods, at equal bits.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--budgets", metavar="BITS", help="total bits per block weight, separated by commas")
    options.add_argument("--methods", metavar="NAMES", help="separated by commas; default: all")
    options.add_argument("--windows", type=int, metavar="N", help="held-out windows (default 12, short 4)")
    options.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration rows of 512 tokens")
    given = options.parse_args()
    rows.show(measure(given), given.json)

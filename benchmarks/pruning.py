"""What pruning costs, before and after alignment: every ranking at the same true reduction of the blocks' parameters.

    python benchmarks/pruning.py [--short] [--json FILE] [--model smollm2|gemma3|stories260k]
        [--reductions 0.1,0.2,0.3,0.5] [--methods NAMES] [--steps 32] [--windows N] [--calibration N]

The base is the model decomposed to 4 bits, whose codes are sliced. After: slot C was trained on the same rows of
generic text by every method, `--steps` of 4 rows of 256 tokens, to predict what the original predicts; of the methods
named lora, LoRAPrune's loop takes the first half of these steps and alignment the second. `lora-published` starts
adapters as LoRA does and counts the term that is quadratic in the gradients, `lora` sees columns from their side.
`allocated` is `activation` with widths of each layer chosen by the integer programme from measured losses,
`allocated-scores` from sums of scores alone; `bias` is FLAP's score with what goes leaving its mean behind,
`allocated-bias` the same with allocated widths; all others prune every layer alike. The methods named after a pattern
take single entries, the same share of every linear map, where the pattern has that share and fits the model's inputs:
they save no memory, and stand beside the others, not among them. Ratio is perplexity over that of the unpruned,
unquantised model, spread its standard error over windows; the last row of a reduction is the best of ours (lora,
activation, allocated in any way) over the lowest of the others, after alignment. Text and models:
benchmarks/perplexity.py.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

import rows
from perplexity import SUBJECTS, base_losses, compare, context, heldout, setting, settings
from rows import Row

from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.errors import ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score
from qlora_pipe.hf.sequences import Row as Tokens
from qlora_pipe.stages.models import aligned_model, pruned_model

REDUCTIONS = (0.1, 0.2, 0.3, 0.5)
OURS = ("lora", "activation", "allocated", "allocated-scores", "allocated-bias")
OTHERS = ("random", "magnitude", "taylor", "wanda", "flap")
RIVALS = (*OTHERS, "lora-published", "bias")
PATTERNS = {"unstructured": None, "2:4": 0.5, "4:8": 0.5}
"""Patterns of single entries and the one share that they have."""
BATCH = {"batch_size": 4, "length": 256}


def methods(steps: int) -> dict[str, tuple[str, ...]]:
    """Overrides by name."""
    aligned = setting("align", enabled=True, steps=steps, **BATCH)
    halves = (*setting("align", enabled=True, steps=steps // 2, **BATCH), *setting("guide", steps=steps // 2, **BATCH))
    found = {name: (*setting("prune", method=name), *aligned) for name in OTHERS}
    for name, guide in (("lora-published", {"sides": "published", "eta": 1.0}), ("lora", {})):
        found[name] = (*setting("prune", method="lora"), *setting("guide", interval=2, **guide), *halves)
    found["activation"] = (*setting("prune", method="activation"), *aligned)
    allocated = setting("prune", method="activation", widths="allocated")
    entries = {
        f"{pattern}-{by}": (*setting("prune.sparsity", pattern=pattern, by=by), *aligned)
        for pattern in PATTERNS
        for by in ("sparsegpt", "wanda")
    }
    found["allocated"] = (*allocated, *aligned)
    found["allocated-scores"] = (*allocated, *setting("prune", losses="scores"), *aligned)
    found["bias"] = (*setting("prune", method="flap", bias=True), *aligned)
    found["allocated-bias"] = (*found["bias"], *setting("prune", widths="allocated"))
    return found | entries


def removing(name: str, share: float, align: int) -> tuple[str, ...] | None:
    """Overrides for how much goes; None where the method has another share."""
    pattern = name.rpartition("-")[0]
    if pattern not in PATTERNS:
        return setting("prune", ratio=share, align=align)
    if PATTERNS[pattern] is None:
        return setting("prune.sparsity", ratio=share)
    return () if PATTERNS[pattern] == share else None


def measured(config: Config, windows: Sequence[Tokens]) -> tuple[list[float], list[float], float]:
    """Losses before and after alignment, and the true reduction, or the true share of entries."""
    artifacts = compile_model(config, Reporter(), until="align")
    seen = context(config, artifacts)
    before, after = ([score(make(seen), [w]).loss for w in windows] for make in (pruned_model, aligned_model))
    body = seen.read_json("select", "selection.json")
    reduction = body["true_sparsity"] if "sparsity" in body else body["true_reduction"]
    for stage in ("select", "prune", "align"):
        shutil.rmtree(artifacts[stage].folder)
    return before, after, reduction


def best_rows(share: float, after: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """The best of ours beside the lowest of the others."""
    sides = [{name: loss for name, loss in after.items() if name in group} for group in (OURS, RIVALS)]
    if all(sides):
        ours, other = (min(side, key=lambda name: statistics.fmean(side[name])) for side in sides)
        measure = f"{share:.0%}, aligned: ours ({ours}) / lowest other ({other})"
        yield compare(measure, sides[0][ours], sides[1][other], 1.0)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Two rows a reduction and method, and each reduction's summary."""
    subject = SUBJECTS[arguments.model]
    windows = heldout(subject, arguments.windows or (4 if arguments.short else 8))
    known = methods(arguments.steps)
    names = arguments.methods.split(",") if arguments.methods else list(known)
    if set(names) - set(known):
        raise SystemExit(f"--methods: expected some of {', '.join(known)}, found {arguments.methods}")
    # Of a tiny model the feed-forward widths are no multiples of 64.
    align = 4 if subject.ranks else 64
    base = (*setting("decompose", budget="4bits"), *setting("export", small=False))
    whole = base_losses(settings(subject), windows)
    shares = [float(text) for text in arguments.reductions.split(",")] if arguments.reductions else REDUCTIONS
    for share in shares[1:2] if arguments.short else shares:
        after: dict[str, list[float]] = {}
        for name in names:
            removed = removing(name, share, align)
            if removed is None:
                continue
            config = settings(subject, *base, *known[name], *removed, sequences=arguments.calibration)
            try:
                before, after[name], reduction = measured(config, windows)
            except ConfigError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            place = f"{subject.name}, {share:.0%} ({reduction:.2%}): {name}"
            yield compare(f"{place}, pruned / unpruned", before, whole, None)
            yield compare(f"{place}, aligned / unpruned", after[name], whole, None)
        yield from best_rows(share, after)


if __name__ == "__main__":
    options = rows.parser("Perplexity after pruning, by how groups are ranked, before and after alignment.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--reductions", metavar="SHARES", help="of the blocks' parameters, separated by commas")
    options.add_argument("--methods", metavar="NAMES", help="separated by commas; default: all")
    options.add_argument("--steps", type=int, default=32, metavar="N", help="training steps of every method")
    options.add_argument("--windows", type=int, metavar="N", help="held-out windows (default 8, short 4)")
    options.add_argument("--calibration", type=int, default=16, metavar="N", help="calibration rows of 512 tokens")
    given = options.parse_args()
    rows.show(measure(given), given.json)

"""What every piece of the decomposition is worth: the defaults beside the same without one piece, at 2.75 bits.

    python benchmarks/ablation.py [--short] [--json FILE] [--model smollm2|gemma3|stories260k] [--budget 2.75]
        [--draws 3] [--only NAMES] [--windows N] [--calibration N]

Each draw calibrates on another part of the calibration text: the text is cut into as many parts, and rows are taken
from the start of each. Both sides of a row share the draw. Ratio is perplexity with the piece over perplexity without
it, the geometric mean over draws; below 1 it pays. Spread is its standard deviation over draws; with one draw the
standard error over windows. The metrics are compared under rounding to nearest, since feedback needs the covariance:
they differ in the metric alone. The last row is the same budget against one configuration for all matrices at that
one's bytes. Text and models: benchmarks/perplexity.py.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import rows
from perplexity import SUBJECTS, Subject, compare, heldout, losses, same_bytes, setting, settings
from rows import Row

from qlora_pipe import datasets
from qlora_pipe.hf.sequences import Row as Tokens

NEAREST = setting("decompose", rounding="nearest")
REFINE = {"enabled": True, "length": 256}

# (with, without) as overrides of the defaults, by what differs.
PIECES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "codebook: lloyd / nf": ((), setting("decompose", grids=["nf"])),
    "metric: covariance / fisher, nearest": (NEAREST, setting("decompose", metric="fisher")),
    "metric: covariance / none, nearest": (NEAREST, setting("decompose", metric="none")),
    "metric: fisher / none, nearest": (setting("decompose", metric="fisher"), setting("decompose", metric="none")),
    "feedback / nearest": ((), NEAREST),
    "scale search / none": ((), setting("decompose", scale_search=False)),
    "iterations: 4 / 1": (setting("decompose", iterations=4), setting("decompose", iterations=1)),
    "ranks allocated / 0": ((), setting("decompose", ranks=[0])),
    "loss scale / none": ((), setting("decompose", loss_scale=False)),
    "token weighting: gradient / none": ((), setting("calibrate", weighting="none")),
    "refine, 48 steps end to end / none": (setting("refine", **REFINE, steps=48), ()),
    "refine, 16 rows by blocks / none": (setting("refine", **REFINE, block_rows=16, steps=0), ()),
}
UNIFORM = "allocated / uniform, equal bytes"


def draw(subject: Subject, number: int, count: int) -> tuple[str, ...]:
    """Calibration on one of `count` parts of the text, which is written beside the run."""
    config = settings(subject)
    text = datasets.load(config.data.calibration, "train", 0)[0].text
    size = len(text) // count
    path = Path(str(config.run)) / f"draw-{number}-of-{count}.txt"
    path.write_text(text[number * size : (number + 1) * size], encoding="utf-8")
    return (f"data.calibration={path}",)


def uniform(subject: Subject) -> tuple[str, ...]:
    """One configuration for every matrix, of about 2.75 bits in a model of this size."""
    rank = 1 if subject.ranks else 8
    return setting("decompose", budget="32bits", bits=[2], block_sizes=[32], ranks=[rank])


def over_draws(name: str, ours: Sequence[Sequence[float]], peer: Sequence[Sequence[float]]) -> Row:
    """Losses by draw and window; from one draw the spread is that over windows."""
    if len(ours) == 1:
        return compare(name, ours[0], peer[0], 1.0)
    one, other = ([statistics.fmean(row) for row in side] for side in (ours, peer))
    differences = [a - b for a, b in zip(one, other, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    values = math.exp(statistics.fmean(one)), math.exp(statistics.fmean(other))
    return Row(name, *values, ratio, "< 1", ratio < 1, ratio * statistics.stdev(differences))


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """One row a piece."""
    subject = SUBJECTS[arguments.model]
    windows: Sequence[Tokens] = heldout(subject, arguments.windows or (4 if arguments.short else 12))
    count = arguments.draws or (1 if arguments.short else 3)
    draws = [draw(subject, number, count) for number in range(count)]
    known = [*PIECES, UNIFORM]
    names = arguments.only.split(";") if arguments.only else known
    if set(names) - set(known):
        raise SystemExit(f"--only: expected some of {'; '.join(known)}, found {arguments.only}")

    def found(overrides: tuple[str, ...], calibrated: tuple[str, ...]) -> tuple[list[float], tuple[str, ...]]:
        budget = setting("decompose", budget=f"{arguments.budget:g}bits")
        config = settings(subject, *budget, *overrides, *calibrated, sequences=arguments.calibration)
        loss, body = losses(config, windows)
        return loss, same_bytes(body)

    for name in names:
        ours, peer = [], []
        for calibrated in draws:
            if name == UNIFORM:
                loss, size = found(uniform(subject), calibrated)
                ours.append(found(size, calibrated)[0])
                peer.append(loss)
            else:
                with_piece, without = PIECES[name]
                ours.append(found(with_piece, calibrated)[0])
                peer.append(found(without, calibrated)[0])
        bits = "" if name == UNIFORM else f"{arguments.budget:g} bits, "
        yield over_draws(f"{bits}{name}", ours, peer)


if __name__ == "__main__":
    options = rows.parser("The defaults beside the same without one piece.")
    options.add_argument("--model", choices=sorted(SUBJECTS), default="smollm2")
    options.add_argument("--budget", type=float, default=2.75, metavar="BITS", help="total bits per block weight")
    options.add_argument("--draws", type=int, metavar="N", help="calibration draws (default 3, short 1)")
    options.add_argument("--only", metavar="NAMES", help="names of rows, separated by semicolons")
    options.add_argument("--windows", type=int, metavar="N", help="held-out windows (default 12, short 4)")
    options.add_argument("--calibration", type=int, default=32, metavar="N", help="calibration rows of 512 tokens")
    given = options.parse_args()
    rows.show(measure(given), given.json)

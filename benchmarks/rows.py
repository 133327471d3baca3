"""The one form of every benchmark: rows of a measure, ours beside a peer, in one run."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measure. `ratio` is said by `bar` to be one way round ("<= 1.6", ours / peer) or the other (">= 15x").

    `holds` is None where no bar is set; `spread` is in the units of `ratio`, or of `ours` without a peer.
    """

    measure: str
    ours: float
    peer: float | None
    ratio: float | None
    bar: str
    holds: bool | None
    spread: float


def parser(description: str) -> argparse.ArgumentParser:
    """--short and --json, to which a benchmark may add options of its own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--short", action="store_true", help="smaller instances or fewer repeats")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    return made


def show(found: Iterable[Row], file: Path | None) -> None:
    """Print each row as it comes; a bar that does not hold is printed like any other."""
    print(f"{'measure':<72}{'ours':>12}{'peer':>12}{'ratio':>10}  {'bar':<10}{'holds':<7}{'spread':>10}", flush=True)
    rows = []
    for row in found:
        rows.append(asdict(row))
        peer = "-" if row.peer is None else f"{row.peer:.4g}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.4g}"
        holds = {True: "yes", False: "NO", None: "-"}[row.holds]
        figures = f"{row.ours:>12.4g}{peer:>12}{ratio:>10}  {row.bar:<10}{holds:<7}{row.spread:>10.2g}"
        print(f"{row.measure:<72}{figures}", flush=True)
        if file:
            file.write_text(json.dumps(rows, indent=2) + "\n")


def run(description: str, measure: Callable[[bool], Iterator[Row]]) -> None:
    """A benchmark without options of its own."""
    arguments = parser(description).parse_args()
    show(measure(arguments.short), arguments.json)

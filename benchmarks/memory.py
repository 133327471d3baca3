"""Peak resident memory of every stage of the demo, measured beside planned.

    python benchmarks/memory.py [--short] [--json FILE]

Runs examples/smollm2.yaml where it is not done yet (a finished stage keeps the figure it was made with); --short stops
after decompose. Ours is the measured peak in bytes, the peer the plan's figure; the plan should be within a quarter.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import rows
from rows import Row

from qlora_pipe.compile import compile_model, read_stats
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.known import CHAIN

CONFIG = Path(__file__).parent.parent / "examples/smollm2.yaml"
TOLERANCE = 0.25


def measure(short: bool) -> Iterator[Row]:
    """One row a stage, and one for the whole run."""
    config = load(CONFIG, ())
    compile_model(config, Reporter(), until="decompose" if short else CHAIN[-1])
    run = Path(str(config.run))
    planned = {stage["name"]: stage["host_peak"] for stage in json.loads((run / "plan.json").read_text())["stages"]}
    measured = {name: stats["peak_bytes"] for name, stats in read_stats(run).items() if name in planned}
    for name, peak in measured.items():
        yield row(f"{name}: peak bytes measured / planned", peak, planned[name])
    yield row("all stages: peak bytes measured / planned", max(measured.values()), max(planned[n] for n in measured))


def row(name: str, measured: float, planned: float) -> Row:
    ratio = measured / planned
    return Row(name, measured, planned, ratio, "1 +- 0.25", abs(ratio - 1) <= TOLERANCE, 0.0)


if __name__ == "__main__":
    rows.run("Peak memory of every stage, measured beside planned.", measure)

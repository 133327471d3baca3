"""Faults put into runs of a tiny model, and what came of them.

    python benchmarks/faults.py [--short] [--json FILE] [--faults N] [--kinds KIND,...] [--computing N] [--seed N]

Each fault goes into one stage, at one of the files that the stage touches, tensors that it writes or files that it has
committed; all stages and all such places are drawn without replacement until none is left. After a fault, what stands
for a stage must be whole, and the same command given again must end with the hashes of an undisturbed run. Stages write
again what they wrote in that run, through the same readers, writers and commits, but for kind `computing`: SIGKILL, one
after the other, in a run whose stages compute. Damage to what a manifest says of versions and of plans goes unnoticed,
as no artifact hangs on it.
"""

import argparse
import errno
import itertools
import multiprocessing
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import rows
import torch
from rows import Row

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fault_injection import Bench, hashes, run_and_die, run_whole
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.artifacts.manifest import MANIFEST, read_manifest
from qlora_pipe.known import CHAIN

Fault = Callable[[], str]

COMPUTING, WRONG = "computing", "WRONG"

WEIGHT = {"SIGKILL": 5, "SIGTERM": 3, "disk full": 5, "read error": 3, "bit flip": 4, "truncated": 4, "moved": 2}
"""Faults of a kind in one turn through all kinds, where they are more than one."""


def places(bench: Bench, generator: random.Random) -> dict[str, list[Fault]]:
    """Every fault of every kind that has a place, shuffled."""
    made: dict[str, list[Fault]] = {kind: [] for kind in (*WEIGHT, "disk full inside a tensor", "out of memory")}
    made |= {kind: [] for kind in ("second run", "read-only input", "clock jumps")}

    def add(kind: str, function: Callable[..., str], *arguments: object, **options: object) -> None:
        made[kind].append(lambda: function(*arguments, **options))

    for stage in CHAIN:
        for at in range(bench.count(stage, "change")):
            add("SIGKILL", bench.signal, signal.SIGKILL, stage, at)
            add("SIGTERM", bench.signal, signal.SIGTERM, stage, at)
            add("moved", bench.signal, signal.SIGKILL, stage, at, moved=True)
            add("disk full", bench.error, errno.ENOSPC, "change", stage, at)
        for at in range(bench.count(stage, "read")):
            add("read error", bench.error, errno.EIO, "read", stage, at)
        for at in range(bench.tensors(stage)):
            add("disk full inside a tensor", bench.inside, lambda: OSError(errno.ENOSPC, "No space left"), stage, at)
            add("out of memory", bench.inside, MemoryError, stage, at)
            add("out of memory", bench.inside, lambda: torch.OutOfMemoryError("CUDA out of memory"), stage, at)
        if stage != CHAIN[-1]:
            for name in (MANIFEST, *read_manifest(bench.calm / stage).files):
                add("bit flip", bench.damage, lambda body: flipped(body, generator), stage, name)
                add("truncated", bench.damage, lambda body: body[: generator.randrange(len(body))], stage, name)
        add("second run", bench.second, stage)
        add("read-only input", bench.read_only, stage)
        add("clock jumps", bench.clock, stage, generator)
    for found in made.values():
        generator.shuffle(found)
    return made


def flipped(body: bytes, generator: random.Random) -> bytes:
    place = generator.randrange(len(body))
    return body[:place] + bytes([body[place] ^ 1 << generator.randrange(8)]) + body[place + 1 :]


def chosen(made: dict[str, list[Fault]], count: int) -> Iterator[tuple[str, Fault]]:
    """`count` faults, kinds in turn."""
    while count and any(made.values()):
        for kind in made:
            for _ in range(min(WEIGHT.get(kind, 1), len(made[kind]), count)):
                count -= 1
                yield kind, made[kind].pop()


def computing(bench: Bench, kills: int, changes: int) -> Iterator[str]:
    """Kills of a run whose stages compute, a little later each time, as what a stage cannot go on from has to fit
    between two; raises AssertionError if it ends with other hashes."""
    run, step = bench.place / COMPUTING, max(1, changes // (kills + 1))
    for number in itertools.count(1):
        at = step + step * number // max(1, kills)
        process = bench.spawn(target=run_and_die, args=(bench.path, None, run, CHAIN[-1], at, signal.SIGKILL))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, f"exit code {process.exitcode}"
        yield "killed"
        assert number <= 10 * kills, "the run does not get on"
    assert hashes(run) == bench.expected


def bench_in(folder: Path) -> tuple[Bench, int]:
    """An undisturbed run of a tiny model in `folder`, and its changes of files."""
    save_tiny_model(folder / "model")
    save_texts(folder)
    path = save_settings(folder, train={"teacher": "original"}, compact={"block_rows": 2})
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["fault_injection", "transformers.trainer"])
    changes = server.Value("i", 0)
    process = server.Process(target=run_whole, args=(path, folder / "calm", changes))
    process.start()
    process.join()
    assert process.exitcode == 0
    return Bench(path, folder / "calm", server.Process), changes.value


def injected(bench: Bench, changes: int, given: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Kind and outcome of every fault; WRONG for what was not survived, which standard error says more of."""
    made = places(bench, random.Random(given.seed))
    kinds = given.kinds.split(",") if given.kinds else [*made, COMPUTING]
    if set(kinds) - {*made, COMPUTING}:
        raise SystemExit(f"--kinds: expected some of {', '.join([*made, COMPUTING])}, found {given.kinds}")
    for number, (kind, fault) in enumerate(chosen({kind: made[kind] for kind in kinds if kind in made}, given.faults)):
        yield kind, survived(kind, fault)
        if number % 50 == 49:
            print(f"{number + 1} faults", file=sys.stderr, flush=True)
    if COMPUTING in kinds:
        kills = computing(bench, given.computing, changes)
        while (told := survived(COMPUTING, lambda: next(kills, ""))) != "":
            yield COMPUTING, told
            if told == WRONG:
                break


def survived(kind: str, fault: Fault) -> str:
    """The outcome of a fault."""
    try:
        return fault()
    except Exception as error:  # noqa: BLE001 -- whatever it is, a fault was not survived
        print(f"{kind}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return WRONG


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """A row a kind, with what came of its faults; one of all, and one of a consumer's looks."""
    torch.set_num_threads(1)
    if given.short:
        given.faults, given.computing = 60, 4
    with tempfile.TemporaryDirectory() as place:
        bench, changes = bench_in(Path(place).resolve())
        outcomes = Counter(injected(bench, changes, given))
        for kind in dict.fromkeys(kind for kind, _ in outcomes):
            found = {told: count for (other, told), count in outcomes.items() if other == kind}
            told = ", ".join(f"{outcome} {count}" for outcome, count in found.items())
            yield row(f"{kind}: survived / injected ({told})", sum(found.values()), found.get(WRONG, 0))
        lost = sum(count for (_, told), count in outcomes.items() if told == WRONG)
        yield row("all faults: survived / injected", outcomes.total(), lost)
        looks: list[int] = []
        wrong = sum(
            survived("watched", lambda stage=stage: looks.append(bench.watched(stage)) or "") == WRONG
            for stage in CHAIN[1:]
        )
        yield row("stages a consumer looks into while they are written: whole / all", len(CHAIN) - 1, wrong)
        yield Row("looks of it", sum(looks), None, None, "-", None, 0.0)
        assert hashes(bench.calm) == bench.expected


def row(name: str, count: int, wrong: int) -> Row:
    return Row(name, count - wrong, count, (count - wrong) / count, "= 1", wrong == 0, 0.0)


if __name__ == "__main__":
    options = rows.parser("Faults put into runs of a tiny model, and what came of them.")
    options.add_argument("--faults", type=int, default=510, metavar="N", help="but for those of a run that computes")
    options.add_argument("--kinds", metavar="KINDS", help="some kinds alone, with commas between")
    options.add_argument("--computing", type=int, default=12, metavar="N", help="kills in a run whose stages compute")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    rows.show(measure(arguments), arguments.json)

"""Faults put into a run on purpose: at any touch of a file, in any stage, and what has to hold after each.

A fault is laid into one stage of a run whose earlier stages are done. Afterwards no stage may stand for anything but
what the undisturbed run made, and the same command, given again, has to end with the undisturbed run's hashes. Stages
put what they made in the undisturbed run through the same readers, writers and commits again, instead of computing it
anew: a fault takes a fraction of a second. `computing` faults are those that let stages compute.

Python tells an audit hook of every file that is opened, renamed, linked or removed, just before: that is where faults
come in, without a patch to what is tested. A hook cannot be taken out again, so there is one, with an action to set.
"""

import errno
import gc
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_pipe import compile as compiler
from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.artifacts.manifest import MANIFEST, check_files, read_manifest
from qlora_pipe.artifacts.store import Store
from qlora_pipe.artifacts.tensors import TensorReader, TensorWriter
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError, QloraPipeError
from qlora_pipe.events import Reporter
from qlora_pipe.inspection import describe, weight_sets
from qlora_pipe.known import CHAIN
from qlora_pipe.stages.base import Context
from qlora_pipe.status import show_status

Touch = Callable[[str, str], None]
"""Called before a file of a run is touched, with "change" or "read" and its path."""

_CHANGES = {"os.rename", "os.remove", "os.symlink", "os.truncate", "os.mkdir", "os.rmdir"}
_action: list[Touch] = []

UNHASHED = {"versions", "planned"}
"""What a manifest says that no artifact hangs on."""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _action or (event != "open" and event not in _CHANGES):
        return
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    changes = True
    if event == "open" and isinstance(arguments[2], int):
        changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or arguments[1] is None
    if os.path.isabs(path):
        _action[0]("change" if changes else "read", path)


@contextmanager
def touching(action: Touch) -> Iterator[None]:
    """Call `action` before every touch of a file while the block lasts; what it raises, the touch raises."""
    if not hasattr(sys, "_faults_hooked"):
        sys.addaudithook(_hook)
        sys._faults_hooked = True  # type: ignore[attr-defined]
    _action.append(action)
    try:
        yield
    finally:
        _action.remove(action)


@dataclass
class Counted:
    """Does `act` at touch number `at` of that kind below `folder`, and counts them all."""

    folder: Path
    kind: str
    at: int = -1
    act: Callable[[], None] = lambda: None
    count: int = 0

    def __call__(self, kind: str, path: str) -> None:
        if kind == self.kind and path.startswith(str(self.folder)):
            self.count += 1
            if self.count - 1 == self.at:
                self.act()


def fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def die(number: int) -> None:
    os.kill(os.getpid(), number)


@contextmanager
def replayed(calm: Path) -> Iterator[None]:
    """Stages write again what they wrote in the run `calm`."""
    stages = compiler.STAGES
    compiler.STAGES = tuple(replace(stage, run=partial(_replay, calm / stage.name)) for stage in stages)
    try:
        yield
    finally:
        compiler.STAGES = stages


def _replay(made: Path, context: Context) -> None:
    manifest = read_manifest(made)
    for folder, stem in weight_sets(manifest):
        reader = TensorReader(made / folder, stem)
        layout = {name: place.spec for name, place in read_folder(made / folder, stem).items()}
        with context.writer(layout, stem=stem, folder=folder or ".") as writer:
            for name in reader:
                writer.write(name, reader.read(name))
    for name in manifest.files:
        if ".safetensors" not in name:
            (context.out / name).parent.mkdir(parents=True, exist_ok=True)
            (context.out / name).write_bytes((made / name).read_bytes())


def run_chain(config: Config, until: str = CHAIN[-1]) -> None:
    with open(os.devnull, "w") as nowhere:
        compiler.compile_model(config, Reporter(stream=nowhere), until=until)


def run_and_die(path: Path, calm: Path | None, run: Path, until: str, at: int, number: int) -> None:
    """The work of a process that a signal ends at its change number `at`; without `calm`, stages compute."""
    gc.freeze()
    torch.set_num_threads(1)
    config = load(path, (f"run={run}",))
    with touching(Counted(run, "change", at, partial(die, number))):
        if calm is None:
            run_chain(config, until)
        else:
            with replayed(calm):
                run_chain(config, until)


def run_whole(path: Path, run: Path, changes: Any) -> None:
    """An undisturbed run; its number of changes goes into a shared value."""
    torch.set_num_threads(1)
    with touching(counted := Counted(run, "change")):
        run_chain(load(path, (f"run={run}",)))
    changes.value = counted.count


def hashes(run: Path, until: str = CHAIN[-1]) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every stage, hashed now; but for the file that names the run's own base folder."""
    return {
        stage: {
            name: entry.sha256
            for name, entry in check_files(run / stage).files.items()
            if name != "peft/adapter_config.json"
        }
        for stage in CHAIN[: CHAIN.index(until) + 1]
    }


@dataclass
class Bench:
    """An undisturbed run, and folders to lay faults into. `spawn` makes a process that has everything imported."""

    path: Path
    calm: Path
    spawn: Callable[..., Any]

    def __post_init__(self) -> None:
        # A stage begins with a collection, which is quick where it does not look at all that is imported.
        gc.freeze()
        self.config = load(self.path)
        self.expected = hashes(self.calm)
        self.place = self.calm.parent
        self.number = 0

    def before(self, stage: str) -> Path:
        """A run folder that has come to `stage`. Files are shared: nothing that is committed is ever written to."""
        self.number += 1
        run = self.place / f"fault-{self.number}"
        shutil.copytree(self.calm, run, symlinks=True, copy_function=os.link)
        (run / ".lock").unlink(missing_ok=True)
        for name in CHAIN[CHAIN.index(stage) :]:
            shutil.rmtree((run / name).resolve())
            (run / name).unlink()
        return run

    def go(self, run: Path, stage: str) -> None:
        with replayed(self.calm):
            run_chain(self.config.model_copy(update={"run": str(run)}), stage)

    def count(self, stage: str, kind: str) -> int:
        """How often a run that makes `stage`, and finds what is before it, touches a file in that way."""
        run = self.before(stage)
        with touching(counted := Counted(run, kind)):
            self.go(run, stage)
        shutil.rmtree(run)
        return counted.count

    def tensors(self, stage: str) -> int:
        """How many tensors a stage writes."""
        sets = weight_sets(read_manifest(self.calm / stage))
        return sum(len(read_folder(self.calm / stage / folder, stem)) for folder, stem in sets)

    def check(self, run: Path, stage: str, *, moved: bool = False) -> None:
        """After a fault: nothing stands for a stage that is not its whole artifact, and going on ends alike."""
        for name in CHAIN:
            if (run / name).is_symlink():
                found = check_files(run / name)
                assert found.stage == name, f"{found.stage} stands for {name}"
        show_status(run)
        self.go(run, stage)
        for name, found in hashes(run, stage).items():
            assert found == self.expected[name], f"{name} has other hashes"
        left = {path.name for path in (run / ".work").iterdir()} - {"state.json"}
        if moved:
            # Export is another artifact where the run lies elsewhere; what was begun of it has no checkpoints.
            left = {name for name in left if not name.startswith("export-") or any((run / ".work" / name).iterdir())}
        assert not left, f"left over: {sorted(left)}"
        shutil.rmtree(run)

    def signal(self, number: int, stage: str, at: int, *, moved: bool = False) -> str:
        """Kill the process at its change `at`; with `moved`, the folder has another name when it goes on."""
        run = self.before(stage)
        process = self.spawn(target=run_and_die, args=(self.path, self.calm, run, stage, at, number))
        process.start()
        process.join()
        assert process.exitcode == -number, f"exit code {process.exitcode}, expected {-number}"
        if moved:
            run = run.rename(run.with_name(f"{run.name}-moved"))
        self.check(run, stage, moved=moved)
        return "killed"

    def error(self, code: int, kind: str, stage: str, at: int) -> str:
        """The touch `at` fails with that error number."""
        run = self.before(stage)
        with touching(Counted(run, kind, at, partial(fail, code))):
            told = self._try(run, stage)
        self.check(run, stage)
        return told

    def inside(self, make: Callable[[], BaseException], stage: str, at: int) -> str:
        """The tensor number `at` that a stage writes gets half of its bytes, and an error of that kind."""
        run, real, left = self.before(stage), TensorWriter.write, [at]

        def write(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
            left[0] -= 1
            if left[0] >= 0:
                real(self, name, tensor)
                return
            place = self._places[name]
            self._streams[place.file].seek(place.offset)
            self._streams[place.file].write(bytes(place.spec.nbytes // 2))
            raise make()

        TensorWriter.write = write  # type: ignore[method-assign]
        try:
            told = self._try(run, stage)
        finally:
            TensorWriter.write = real  # type: ignore[method-assign]
        self.check(run, stage)
        return told

    def _try(self, run: Path, stage: str) -> str:
        try:
            self.go(run, stage)
        except QloraPipeError:
            return "typed error"
        return "went on unharmed"

    def damage(self, change: Callable[[bytes], bytes], stage: str, name: str) -> str:
        """A file of a finished stage is other than it was written."""
        run = self.before(CHAIN[-1])
        path = run / stage / name
        body = change(before := path.read_bytes())
        path.unlink()
        path.write_bytes(body)
        try:
            check_files(run / stage)
            assert name == MANIFEST, f"{name} is damaged, and nobody saw it"
            pair = json.loads(before), json.loads(body)
            seen = [{key: value for key, value in each.items() if key not in UNHASHED} for each in pair]
            assert seen[0] == seen[1], "a manifest is damaged, and nobody saw it"
            told = "went on unharmed"
        except ArtifactError:
            told = "found by its hash"
            self.go(run, stage)
        self.check(run, stage)
        return told

    def second(self, stage: str) -> str:
        """Another process works in the folder."""
        run = self.before(stage)
        with Store(run).lock(), pytest.raises(ArtifactError, match=rf"another run \(process {os.getpid()} on "):
            self.go(run, stage)
        self.check(run, stage)
        return "typed error"

    def read_only(self, stage: str) -> str:
        """Nothing but the run folder can be written."""
        run = self.before(stage)

        def refuse(kind: str, path: str) -> None:
            if kind == "change" and path.startswith(str(self.place)) and not path.startswith(str(run)):
                fail(errno.EROFS)

        with touching(refuse):
            self.go(run, stage)
        self.check(run, stage)
        return "went on unharmed"

    def clock(self, stage: str, generator: random.Random) -> str:
        """The time of day jumps by years, back and forth, each time that it is asked for."""
        run, real = self.before(stage), time.time
        time.time = lambda: real() + generator.uniform(-3e8, 3e8)
        try:
            self.go(run, stage)
        finally:
            time.time = real
        self.check(run, stage)
        return "went on unharmed"

    def watched(self, stage: str) -> int:
        """A consumer looks at the whole run folder before every touch of a file in it; how often it did."""
        run, looks, looking = self.before(stage), 0, False
        with touching(lambda kind, path: look(kind, path)):

            def look(kind: str, path: str) -> None:
                nonlocal looks, looking
                if looking or kind != "change" or not path.startswith(str(run)):
                    return
                looking, looks = True, looks + 1
                inside = Path(path).relative_to(run).parts
                # Files come whole, by a rename out of .work, and links by another.
                assert inside[:1] in ((), (".work",), (".objects",), (".lock",)), f"{path} is changed in its place"
                assert (run / "base").exists()
                describe(run)
                show_status(run)
                newest = [name for name in CHAIN if (run / name).exists()][-1]
                check_files(run / newest)
                looking = False

            self.go(run, stage)
        self.check(run, stage)
        return looks

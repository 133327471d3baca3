"""The run folder: content-addressed objects, atomic commits, one link per stage.

<run>/.objects/<stage>-<identity>/    whole artifacts only: they arrive by a rename
<run>/.work/                          what is being written, training checkpoints, and what is said of the work
<run>/.lock                           held by the process that works here, and its name
<run>/<stage> -> .objects/...         the stage's current artifact
"""

import errno
import fcntl
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from qlora_pipe.artifacts.layout import is_weights
from qlora_pipe.artifacts.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    check_files,
    file_digest,
    identity,
    list_files,
    read_manifest,
)
from qlora_pipe.errors import ArtifactError, PlanError, StageError

_FULL = 2**20
"""Free bytes below which a disk counts as full."""

STATE = Path(".work") / "state.json"
"""What the process that works in a run folder, or did last, had to say; see qlora_pipe.events."""

_LOCK = ".lock"

_LIBRARIES = (
    "qlora-pipe", "torch", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "gguf", "numpy", "scipy",
    "pulp", "highspy",
)  # fmt: skip


@dataclass(frozen=True)
class Ticket:
    """A request for an artifact: everything that its identity is made of."""

    stage: str
    code_version: int
    settings: dict[str, Any]
    inputs: dict[str, str]

    @property
    def identity(self) -> str:
        return identity(self.stage, self.code_version, self.settings, self.inputs)


@dataclass(frozen=True)
class Artifact:
    """A committed artifact."""

    folder: Path
    manifest: Manifest

    @property
    def identity(self) -> str:
        return self.manifest.identity


class Store:
    """Artifacts of one run folder."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._objects = run / ".objects"
        self._work = run / ".work"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process out of the run folder; raises ArtifactError naming the owner."""
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            self._work.mkdir(exist_ok=True)
            lock = (self.run / _LOCK).open("a+")
        except OSError as error:
            raise ArtifactError(
                f"{self.run}: expected a folder that can be written, found {error.strerror}; choose another `run`"
            ) from error
        with lock as stream:
            if not _take(stream, self.run):
                raise ArtifactError(
                    f"{self.run}: another run ({_owner(stream)}) is working in this folder; wait for it to end"
                )
            self._tidy()
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
            yield

    def _tidy(self) -> None:
        """Remove what a run left that was killed: nobody else is at work, and its settings may never come back."""
        for left in self._work.glob("*.*"):
            if left.suffix in (".tmp", ".trash"):
                shutil.rmtree(left, ignore_errors=True)
            elif left.suffix in (".link", ".fresh"):
                left.unlink(missing_ok=True)

    def current(self, stage: str) -> Manifest | None:
        """The manifest that `<run>/<stage>` stands for, or None."""
        try:
            return read_manifest(self.run / stage)
        except ArtifactError:
            return None

    def find(self, ticket: Ticket) -> Artifact | None:
        """The artifact of this identity if it is here and whole; a damaged one is moved out of the way, and one that
        cannot be read raises ArtifactError."""
        folder = self._object(ticket)
        if not folder.exists():
            return None
        try:
            artifact = Artifact(folder, check_files(folder))
        except ArtifactError as error:
            # What cannot be read now may be whole: a disk that fails, or a file that is not ours, costs no work.
            if isinstance(error.__cause__, OSError):
                raise
            artifact = None
        if artifact is None or artifact.identity != ticket.identity:
            self._discard(folder)
            return None
        self._point(ticket.stage, folder)
        # Killed right after its commit, a run left its checkpoints.
        shutil.rmtree(self._work / folder.name, ignore_errors=True)
        return artifact

    def work(self, ticket: Ticket) -> Path:
        """A folder that outlives a killed process, for checkpoints of this very ticket."""
        folder = self._work / f"{ticket.stage}-{ticket.identity[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def writing(self, ticket: Ticket) -> Iterator[Path]:
        """An empty folder to fill; removed again if the stage fails."""
        folder = self._work / f"{ticket.stage}-{ticket.identity[:16]}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            yield folder
        except Exception as error:
            # Other libraries turn a full disk into errors of their own.
            refused = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if refused or shutil.disk_usage(self.run).free < _FULL:
                raise StageError(
                    f"{ticket.stage}: the disk that holds {self.run} is full; free some space and run again, "
                    "finished stages are kept"
                ) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, ticket: Ticket, folder: Path, planned: Mapping[str, int]) -> Artifact:
        """Hash, compare with the plan, write the manifest last, then rename into place. Raises PlanError."""
        names = list_files(folder)
        files = {name: FileEntry(file_digest(folder / name), (folder / name).stat().st_size) for name in names}
        weights = {name for name in names if is_weights(name)}
        for name in sorted(weights | set(planned)):
            written = files[name].bytes if name in files else None
            if written != planned.get(name):
                raise PlanError(f"{ticket.stage}/{name}: planned {planned.get(name)} bytes, wrote {written}")
        manifest = Manifest(
            stage=ticket.stage,
            identity=ticket.identity,
            code_version=ticket.code_version,
            settings=ticket.settings,
            inputs=ticket.inputs,
            files=files,
            planned=dict(planned),
            versions=library_versions(),
        )
        (folder / MANIFEST).write_text(manifest.to_json())
        fsync_tree(folder)
        target = self._object(ticket)
        self._discard(target)
        folder.rename(target)
        fsync(self._objects)
        self._point(ticket.stage, target)
        shutil.rmtree(self._work / f"{ticket.stage}-{ticket.identity[:16]}", ignore_errors=True)
        return Artifact(target, manifest)

    def _object(self, ticket: Ticket) -> Path:
        return self._objects / f"{ticket.stage}-{ticket.identity[:16]}"

    def _discard(self, folder: Path) -> None:
        """Remove an object so that no half of it is ever seen under its name."""
        if folder.exists():
            trash = self._work / f"{folder.name}.trash"
            shutil.rmtree(trash, ignore_errors=True)
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _point(self, stage: str, folder: Path) -> None:
        self.link(stage, Path(".objects") / folder.name)

    def link(self, name: str, target: Path) -> None:
        """Let `<run>/<name>` lead to `target`; at every moment it leads to the old one or the new one."""
        link, fresh = self.run / name, self._work / f"{name}.link"
        if link.is_symlink() and link.readlink() == target:
            return
        if link.exists() and not link.is_symlink():
            raise ArtifactError(f"{link}: expected a link of the run folder, found a file or folder; move it elsewhere")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        os.replace(fresh, link)
        fsync(self.run)

    def put(self, name: str, text: str) -> None:
        """Write the file `<run>/<name>`; at every moment it is the old one or the new one."""
        fresh = self._work / f"{name}.fresh"
        fresh.write_text(text)
        os.replace(fresh, self.run / name)


def owner(run: Path) -> str | None:
    """The process that works in a run folder, None if there is none. Writes nothing; raises ArtifactError."""
    try:
        with (run / _LOCK).open() as stream:
            return None if _take(stream, run, fcntl.LOCK_SH) else _owner(stream)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{run / _LOCK}: expected a file that can be read, found {error.strerror}") from error


def _take(stream: TextIO, run: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file, for as long as it is open; whoever only looks (`owner`) has it for a moment."""
    for _ in range(10):
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
        except OSError as error:
            raise ArtifactError(
                f"{run}: expected a folder whose files can be locked, found {error.strerror}; choose another `run`"
            ) from error
    return False


def _owner(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read(200).strip() or "an unknown process"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that an artifact's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def fsync_tree(folder: Path) -> None:
    """Bring a folder and all that is in it to the disk."""
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def fsync(path: Path) -> None:
    """Bring what is written of a file, or of a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_pipe.artifacts.layout import TensorSpec, file_bytes, header
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.artifacts.store import Artifact, Store, Ticket, owner
from qlora_pipe.errors import ArtifactError, PlanError, StageError

ROOT = Path(__file__).parents[3]
ONE, OTHER = (Ticket("train", 1, {"rank": rank}, {"source": "aa"}) for rank in (4, 8))
LAYOUT = {"a": TensorSpec("F32", (3,))}
PLANNED = {"model.safetensors": file_bytes(LAYOUT)}
WEIGHTS = header(LAYOUT) + bytes(12)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "run")
    with store.lock():
        yield store


def make(store: Store, ticket: Ticket = ONE, text: str = "fine") -> Artifact:
    with store.writing(ticket) as out:
        (out / "model.safetensors").write_bytes(WEIGHTS)
        (out / "sub").mkdir()
        (out / "sub/notes.txt").write_text(text)
        return store.commit(ticket, out, PLANNED)


def fail_half_way(out: Path) -> None:
    (out / "half").write_text("half")
    raise ZeroDivisionError


def left_over(store: Store) -> list[str]:
    return sorted(path.name for path in (store.run / ".work").iterdir())


def test_a_committed_artifact_is_found(store: Store) -> None:
    assert store.find(ONE) is None
    assert store.current("train") is None
    made = make(store)
    assert made.identity == ONE.identity
    assert store.find(ONE) == made
    assert store.current("train") == made.manifest == read_manifest(store.run / "train")
    assert set(made.manifest.files) == {"model.safetensors", "sub/notes.txt"}
    assert made.manifest.planned == PLANNED
    assert set(made.manifest.versions) >= {"torch", "transformers"}
    assert left_over(store) == []


def test_the_link_is_relative_so_that_a_run_can_be_moved(store: Store, tmp_path: Path) -> None:
    made = make(store)
    link = store.run / "train"
    assert not link.readlink().is_absolute()
    assert link.resolve() == made.folder
    store.run.rename(tmp_path / "moved")
    assert read_manifest(tmp_path / "moved/train") == made.manifest


def test_two_identities_live_side_by_side_and_switching_back_writes_nothing(store: Store) -> None:
    first, second = make(store), make(store, OTHER, "other")
    assert store.current("train") == second.manifest
    before = {path: path.stat().st_mtime_ns for path in (store.run / ".objects").rglob("*")}
    assert store.find(ONE) == first
    assert (store.run / "train/sub/notes.txt").read_text() == "fine"
    assert store.find(OTHER) == second
    assert (store.run / "train/sub/notes.txt").read_text() == "other"
    assert {path: path.stat().st_mtime_ns for path in (store.run / ".objects").rglob("*")} == before


@pytest.mark.parametrize("name", ["sub/notes.txt", "model.safetensors", "manifest.json"])
def test_a_damaged_object_is_not_found_and_is_replaced(store: Store, name: str) -> None:
    path = make(store).folder / name
    body = path.read_bytes()
    path.write_bytes(bytes([body[0] ^ 1]) + body[1:])
    assert store.find(ONE) is None
    assert store.current("train") is None
    assert left_over(store) == []
    assert store.find(ONE) is None
    made = make(store)
    assert store.find(ONE) == made


def test_a_whole_object_under_the_name_of_another_is_not_taken_for_it(store: Store) -> None:
    make(store).folder.rename(store.run / ".objects" / f"train-{OTHER.identity[:16]}")
    assert store.find(OTHER) is None


def test_committing_again_replaces(store: Store) -> None:
    make(store)
    make(store, text="again")
    assert (store.run / "train/sub/notes.txt").read_text() == "again"
    assert left_over(store) == []


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        ({"model.safetensors": len(WEIGHTS) + 1}, rf"planned {len(WEIGHTS) + 1} bytes, wrote {len(WEIGHTS)}"),
        ({}, r"train/model.safetensors: planned None bytes"),
        (PLANNED | {"adapter.safetensors": 8}, r"train/adapter.safetensors: planned 8 bytes, wrote None"),
    ],
)
def test_what_was_not_planned_is_not_committed(store: Store, planned: dict[str, int], message: str) -> None:
    with store.writing(ONE) as out:
        (out / "model.safetensors").write_bytes(WEIGHTS)
        with pytest.raises(PlanError, match=message):
            store.commit(ONE, out, planned)
    assert not (store.run / "train").exists()
    assert list((store.run / ".objects").iterdir()) == []


def test_a_stage_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.writing(ONE) as out:
        fail_half_way(out)
    assert left_over(store) == []
    assert store.find(ONE) is None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_the_users_to_mend(store: Store, code: int) -> None:
    with pytest.raises(StageError, match=r"train: the disk that holds .* is full"), store.writing(ONE):
        raise OSError(code, "full")
    with pytest.raises(PermissionError), store.writing(ONE):
        raise PermissionError(errno.EPERM, "other errors pass")


DEATH = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import qlora_pipe.artifacts.store as module
from qlora_pipe.artifacts.store import Store, Ticket
store, moment = Store(Path({run!r})), {moment!r}

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

with store.lock(), store.writing(Ticket("train", 1, {{"rank": 4}}, {{"source": "aa"}})) as out:
    (out / "a.txt").write_text("half")
    if moment == "writing":
        die()
    setattr(module, moment, die) if hasattr(module, moment) else setattr(Store, moment, die)
    store.commit(Ticket("train", 1, {{"rank": 4}}, {{"source": "aa"}}), out, {{}})
"""


@pytest.mark.parametrize("moment", ["writing", "file_digest", "library_versions", "fsync", "_discard", "_point"])
def test_a_killed_writer_leaves_nothing_half_under_the_stages_name(tmp_path: Path, moment: str) -> None:
    run = tmp_path / "run"
    script = DEATH.format(root=str(ROOT), run=str(run), moment=moment)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not (run / "train").is_symlink()
    assert not (run / "train").exists()
    store = Store(run)
    with store.lock():
        # Killed before the link was set, the artifact itself is whole or not there.
        found = store.find(ONE)
        assert (found is not None) == (moment == "_point")
        make(store)
        assert store.find(ONE) is not None
    assert left_over(store) == []


def test_what_cannot_be_read_is_not_taken_for_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(store)

    def broken(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("qlora_pipe.artifacts.manifest.file_digest", broken)
        with pytest.raises(ArtifactError, match=r"model.safetensors: cannot be read: Input/output error"):
            store.find(ONE)
    (made.folder / "manifest.json").rename(made.folder / "aside")
    (made.folder / "manifest.json").mkdir()
    with pytest.raises(ArtifactError, match=r"manifest.json: expected a manifest, found .*directory"):
        store.find(ONE)
    (made.folder / "manifest.json").rmdir()
    (made.folder / "aside").rename(made.folder / "manifest.json")
    assert store.find(ONE) == made


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    with store.lock():
        checkpoint = store.work(OTHER) / "checkpoint"
        checkpoint.write_text("step 2")
        # Killed right after the commit, it keeps them.
        made = make(store)
        (store.work(ONE) / "checkpoint").write_text("step 2")
    work = store.run / ".work"
    for name in ("train-0.tmp", "train-1.trash"):
        (work / name).mkdir()
        (work / name / "model.safetensors").write_text("half")
    (work / "train.link").symlink_to("nowhere")
    (work / "plan.json.fresh").write_text("{")
    with store.lock():
        assert store.find(ONE) == made
        assert left_over(store) == [checkpoint.parent.name]
        assert checkpoint.exists()


def test_files_and_links_are_replaced_whole(store: Store) -> None:
    store.put("plan.json", "old")
    with (store.run / "plan.json").open() as reader:
        store.put("plan.json", "new and longer")
        assert reader.read() == "old"
    assert (store.run / "plan.json").read_text() == "new and longer"
    for target in ("one", "other"):
        store.link("base", store.run / target)
        assert (store.run / "base").readlink() == store.run / target
    assert left_over(store) == []


def test_checkpoints_outlive_a_failure_and_go_with_the_commit(store: Store) -> None:
    (store.work(ONE) / "checkpoint").write_text("step 2")
    with pytest.raises(ZeroDivisionError), store.writing(ONE):
        raise ZeroDivisionError
    assert (store.work(ONE) / "checkpoint").exists()
    assert not (store.work(OTHER) / "checkpoint").exists()
    make(store)
    assert not (store.work(ONE) / "checkpoint").exists()


def test_the_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "run"), Store(tmp_path / "run")
    with (
        first.lock(),
        pytest.raises(ArtifactError, match=rf"another run \(process {os.getpid()} on .+\)"),
        second.lock(),
    ):
        pass
    with second.lock():
        pass


def test_whoever_asks_for_the_owner_keeps_nobody_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert owner(run) is None
    with Store(run).lock():
        assert str(owner(run)).startswith(f"process {os.getpid()} on ")
    before = (run / ".lock").read_text(), (run / ".lock").stat().st_mtime_ns
    assert owner(run) is None
    assert ((run / ".lock").read_text(), (run / ".lock").stat().st_mtime_ns) == before
    # Between the two looks of an asker, a run that starts has to wait for it and no more.
    with (run / ".lock").open() as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)
        threading.Timer(0.05, fcntl.flock, (asker, fcntl.LOCK_UN)).start()
        with Store(run).lock():
            pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ArtifactError, match="found No locks available; choose another"), Store(tmp_path).lock():
        pass


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="expected a folder that can be written"), Store(tmp_path / "file").lock():
        pass


@pytest.mark.parametrize("folder", [False, True])
def test_what_the_user_put_under_a_stages_name_is_not_overwritten(store: Store, folder: bool) -> None:
    path = store.run / "train"
    path.mkdir() if folder else path.write_text("mine")
    with pytest.raises(ArtifactError, match="expected a link of the run folder"):
        make(store)
    assert path.is_dir() if folder else path.read_text() == "mine"

"""Running a run again from what it says of itself, and comparing every hash of every stage."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora_pipe.artifacts.manifest import Manifest, check_files
from qlora_pipe.artifacts.store import Ticket
from qlora_pipe.compile import changes, compile_model, read_stats
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError
from qlora_pipe.events import Reporter
from qlora_pipe.inspection import stages_of
from qlora_pipe.known import CHAIN
from qlora_pipe.report.table import render
from qlora_pipe.verify import check_lineage

_PLACE = "base_name"
"""A setting of export that says where the run lies. Which model it is about the hash of the source says."""

_NAMES_ITS_PLACE = ("export", "peft/adapter_config.json", "base_model_name_or_path")
"""Stage, file and field that have it from there: all else of that file has to be the same."""


@dataclass(frozen=True)
class Verdict:
    """What differs in one stage, `differences` with the cause first, and what it was made with that is other now."""

    stage: str
    differences: tuple[str, ...]
    made_with: tuple[str, ...]


def reproduce(run: Path, fresh: Path, reporter: Reporter) -> tuple[str, bool]:
    """Run the chain of `run` again in the new folder `fresh`, as far as it went and with the settings it was made with;
    a table of what is the same, and whether all is.

    Raises ArtifactError if `run` is not whole, or `fresh` is there already; else what compile_model raises.
    """
    stages = stages_of(run)
    for stage in stages:
        check_lineage(run, stage)
    if fresh.exists() and any(fresh.iterdir()):
        raise ArtifactError(f"{fresh}: expected a folder that is not there yet, found one; name another with --into")
    config = load(run / "config.yaml").model_copy(update={"run": str(fresh)})
    compile_model(config, reporter, until=stages[-1])
    found = list(compare(run, fresh))
    made_with = dict.fromkeys(line for verdict in found for line in verdict.made_with)
    rows = [(verdict.stage, "DIFFERS" if verdict.differences else "the same") for verdict in found]
    parts = [render(("stage", "every file"), rows, text_columns=2)]
    if made_with:
        parts.append("\n".join(("made with something else than this run:", *made_with)))
    first = next((verdict for verdict in found if verdict.differences), None)
    if first is not None:
        parts.append("\n".join((f"the first difference is in {first.stage}:", *first.differences)))
    parts.append(f"made again in {fresh}")
    return "\n\n".join(parts), first is None


def compare(run: Path, again: Path) -> Iterator[Verdict]:
    """Every stage of `run` beside that of `again`, all files hashed anew; raises ArtifactError for a damaged one."""
    stats = read_stats(run), read_stats(again)
    for stage in CHAIN[: CHAIN.index(stages_of(run)[-1]) + 1]:
        old, new = check_files(run / stage), check_files(again / stage)
        made_with = [
            f"{name} {old.versions.get(name, 'unknown')}, now {new.versions.get(name, 'unknown')}"
            for name in sorted(old.versions.keys() | new.versions.keys())
            if old.versions.get(name) != new.versions.get(name)
        ]
        threads = [found.get(stage, {}).get("threads", torch.get_num_threads()) for found in stats]
        if threads[0] != threads[1]:
            made_with.append(f"{threads[0]:.0f} threads, now {threads[1]:.0f}: sums on the CPU depend on it")
        differences = (*_asked(old, new), *_files(run / stage, old, again / stage, new))
        yield Verdict(stage, differences, tuple(made_with))


def _asked(old: Manifest, new: Manifest) -> Iterator[str]:
    """Settings, code and inputs that differ."""
    plain = [{key: value for key, value in each.settings.items() if key != _PLACE} for each in (old, new)]
    yield from changes(replace(old, settings=plain[0]), Ticket(new.stage, new.code_version, plain[1], new.inputs))


def _files(folder: Path, old: Manifest, again: Path, new: Manifest) -> Iterator[str]:
    for name in sorted(old.files.keys() | new.files.keys()):
        if name not in old.files or name not in new.files:
            yield f"{name} is in one of them alone"
        elif old.files[name] != new.files[name] and not _names_its_place(old.stage, name, folder, again):
            yield f"{name}: SHA-256 {old.files[name].sha256}, now {new.files[name].sha256}"


def _names_its_place(stage: str, name: str, *folders: Path) -> bool:
    """Whether a file differs in nothing but the run folder that it names."""
    if (stage, name) != _NAMES_ITS_PLACE[:2]:
        return False
    bodies = [json.loads((folder / name).read_text()) for folder in folders]
    for body in bodies:
        body.pop(_NAMES_ITS_PLACE[2])
    return bodies[0] == bodies[1]

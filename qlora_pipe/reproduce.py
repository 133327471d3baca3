"""Running a run again from what it says of itself, and comparing every hash of every stage."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlora_pipe.artifacts.manifest import Manifest, check_files, read_manifest
from qlora_pipe.artifacts.store import Ticket
from qlora_pipe.compile import STAGES, changes, compile_model, read_stats, settings_of
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.hf import ranks
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
    a table of what is the same, and whether all is. Of several processes (torchrun) rank 0 alone has them.

    If this was begun in `fresh` before, it goes on there. Raises ArtifactError if `run` is not whole, its config.yaml
    is not what its stages were made with, or something else is in `fresh`; else what compile_model raises.
    """
    stages = stages_of(run)
    # What a budget for training led to stands in decompose and prune.
    config = load(run / "config.yaml").model_copy(update={"run": str(fresh), "train_budget": None})
    if ranks.rank():
        compile_model(config, reporter, until=stages[-1])
        return "", True
    for stage in stages:
        check_lineage(run, stage)
    _check_settings(run, config, stages)
    if fresh.exists() and any(fresh.iterdir()) and not _begun(run, config, fresh):
        raise ArtifactError(
            f"{fresh}: expected a new folder, or one in which this was begun before, found another; name another with "
            "--into"
        )
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


def _check_settings(run: Path, config: Config, stages: Sequence[str]) -> None:
    """Every command on a run folder writes its config.yaml anew, also one that makes no more than early stages."""
    for stage in STAGES:
        if stage.name not in stages:
            continue
        made = read_manifest(run / stage.name)
        wanted = replace(made, settings=settings_of(stage, config))
        different = next(_asked(made, wanted), None)
        if different is not None:
            raise ArtifactError(
                f"{run / stage.name}: expected it to be made with what config.yaml says, found that {different}, by a "
                "later command that did not come so far; run the chain up to here with the settings that it is to have"
            )


def _begun(run: Path, config: Config, fresh: Path) -> bool:
    """Whether `fresh` is the folder of just this reproduction."""
    if fresh.resolve() == run.resolve():
        return False
    try:
        found = load(fresh / "config.yaml")
    except ConfigError:
        return False
    here = Path(str(found.run)).absolute() == fresh.absolute()
    return here and found.model_copy(update={"run": config.run}) == config


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
        for shared_by, now in (("threads", torch.get_num_threads()), ("processes", ranks.count())):
            before, after = (found.get(stage, {}).get(shared_by, now) for found in stats)
            if before != after:
                made_with.append(f"{shared_by} {before:.0f}, now {after:.0f}: sums on the CPU depend on it")
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

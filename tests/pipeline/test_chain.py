"""The whole chain on random tiny models of every family: planned bytes, resume, changed settings, verify."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import context_of, save_settings, save_texts, save_tiny_model

from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.manifest import FileEntry, file_digest, read_manifest
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError
from qlora_pipe.events import Reporter
from qlora_pipe.known import CHAIN
from qlora_pipe.reproduce import compare, reproduce
from qlora_pipe.stages.train import task_rows
from qlora_pipe.verify import verify_path

FAMILIES = {
    "llama": {},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
}


class Recorder(Reporter):
    """Keeps what the user would read."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def event(self, kind: str, message: str, **fields: object) -> None:
        self.lines.append(f"{self.stage}: {kind}: {message}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default tiny model."""
    folder = tmp_path_factory.mktemp("chain")
    save_tiny_model(folder / "model")
    save_texts(folder)
    compile_model(load(save_settings(folder), ()), Recorder())
    return folder


def hashes(run: Path) -> dict[str, dict[str, str]]:
    """SHA-256 of every file of every stage."""
    return {stage: {name: entry.sha256 for name, entry in read_manifest(run / stage).files.items()} for stage in CHAIN}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_through_the_chain(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", family.partition("-")[0], **FAMILIES[family])
    save_texts(tmp_path)
    artifacts = compile_model(load(save_settings(tmp_path), ()), Recorder())
    assert tuple(artifacts) == CHAIN
    assert len(list(verify_path(tmp_path / "run"))) == len(CHAIN)
    rows = json.loads((tmp_path / "run/evaluate/metrics.json").read_text())
    assert {(row["model"], row["dataset"]) for row in rows} >= {("base", "task"), ("full+recovered", "text")}


def test_planned_bytes_are_written_bytes(finished: Path) -> None:
    plan = json.loads((finished / "run/plan.json").read_text())
    assert plan["exact"]
    for stage in plan["stages"]:
        manifest = read_manifest(finished / "run" / stage["name"])
        weights = {name: entry.bytes for name, entry in manifest.files.items() if ".safetensors" in name}
        assert weights == stage["files"]


@pytest.mark.parametrize("method", ["flap", "taylor"])
def test_widths_that_the_solver_chose_go_through_the_chain(finished: Path, tmp_path: Path, method: str) -> None:
    """Layers of different widths: trained, compacted and recovered, and every byte planned once they are known."""
    overrides = ("prune.ratio=0.3", "prune.widths=allocated", f"prune.method={method}")
    run = tmp_path / "run"
    artifacts = compile_model(load(finished / "tiny.yaml", (*overrides, f"run={run}")), Recorder())
    assert tuple(artifacts) == CHAIN
    assert len(list(verify_path(run))) == len(CHAIN)
    body = json.loads((run / "select/selection.json").read_text())
    assert 0.3 <= body["true_reduction"] < 0.4
    for stage in json.loads((run / "plan.json").read_text())["stages"]:
        written = read_manifest(run / stage["name"]).files
        weights = {name: entry.bytes for name, entry in written.items() if ".safetensors" in name}
        assert weights == stage["files"]


def test_running_again_does_nothing_and_says_so(finished: Path) -> None:
    before, recorder = hashes(finished / "run"), Recorder()
    compile_model(load(finished / "tiny.yaml", ()), recorder)
    assert [line for line in recorder.lines if ": made:" in line] == []
    assert sum("done already" in line for line in recorder.lines) == len(CHAIN)
    assert hashes(finished / "run") == before


@pytest.fixture(scope="module")
def again(finished: Path) -> tuple[Path, str, bool]:
    """The run made again elsewhere after a first attempt, what is said of it and whether it is the same."""
    run, folder, recorder = finished / "run", finished / "again", Recorder()
    begun = load(run / "config.yaml").model_copy(update={"run": str(folder)})
    compile_model(begun, Recorder(), until="calibrate")
    found = reproduce(run, folder, recorder)
    assert [line.partition(":")[0] for line in recorder.lines if ": done:" in line] == ["source", "calibrate"]
    return folder, *found


def test_a_second_run_elsewhere_gives_the_same_bytes(finished: Path, again: tuple[Path, str, bool]) -> None:
    folder, table, same = again
    assert same, table
    assert [line.split()[1:] for line in table.splitlines() if line.split()[:1] == ["evaluate"]] == [["the", "same"]]
    # The adapter's config names the run's own base folder, which is all that may differ.
    first, second = hashes(finished / "run"), hashes(folder)
    assert first["export"].pop("peft/adapter_config.json") != second["export"].pop("peft/adapter_config.json")
    assert first == second
    (finished / "other").mkdir()
    (finished / "other/config.yaml").write_text((folder / "config.yaml").read_text())
    for place in (finished / "run", finished / "other", finished / "model"):
        with pytest.raises(ArtifactError, match="name another with --into"):
            reproduce(finished / "run", place, Recorder())


def test_a_config_that_no_stage_was_made_with_is_refused(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run, symlinks=True)
    # As a command up to decompose would leave it.
    body = yaml.safe_load((run / "config.yaml").read_text())
    body["train"]["learning_rate"] = 0.125
    (run / "config.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(ArtifactError, match=r"run/train: expected .* found that learning_rate changed: .* -> 0\.125"):
        reproduce(run, tmp_path / "again", Recorder())
    assert not (tmp_path / "again").exists()


def test_what_was_not_made_alike_is_named(again: tuple[Path, str, bool], finished: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", again[0]
    shutil.copytree(finished / "run", run, symlinks=True)
    assert not any(verdict.differences or verdict.made_with for verdict in compare(run, other))

    def recommit(stage: str, name: str, **changes: Any) -> None:
        """As if the stage had written that file, and had been made with that."""
        manifest = read_manifest(run / stage)
        entry = FileEntry(file_digest(run / stage / name), (run / stage / name).stat().st_size)
        made = replace(manifest, files=manifest.files | {name: entry}, **changes)
        (run / stage / "manifest.json").write_text(made.to_json())

    config = run / "export/peft/adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 5'))
    recommit("export", "peft/adapter_config.json")
    (run / "recover/extra.json").write_text("{}")
    recommit("recover", "extra.json", versions={"torch": "0.1"})
    path = run / "train/adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    recommit("train", "adapter.safetensors")
    stats = json.loads((run / "stats.json").read_text())
    stats["prune"] |= {"threads": 77, "processes": 3}
    (run / "stats.json").write_text(json.dumps(stats))

    found = {verdict.stage: verdict for verdict in compare(run, other)}
    assert [name for name, verdict in found.items() if verdict.differences] == ["train", "recover", "export"]
    assert found["train"].differences[0].startswith("adapter.safetensors: SHA-256 ")
    assert found["recover"].differences == ("extra.json is in one of them alone",)
    assert found["export"].differences[0].startswith("peft/adapter_config.json: SHA-256 ")
    assert f"torch 0.1, now {version('torch')}" in found["recover"].made_with
    assert found["prune"].made_with == (
        f"threads 77, now {torch.get_num_threads()}: sums on the CPU depend on it",
        "processes 3, now 1: sums on the CPU depend on it",
    )
    # A file that is not what its own manifest says is damage, and no difference of the two runs.
    path.write_bytes(path.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ArtifactError, match="content differs"):
        list(compare(run, other))


def test_a_changed_setting_is_named_and_reruns_what_follows(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    save_texts(tmp_path)
    config = save_settings(tmp_path)
    compile_model(load(config, ()), Recorder())
    recorder = Recorder()
    compile_model(load(config, ("prune.ffn_ratio=0.5",)), recorder)
    made = [line.partition(":")[0] for line in recorder.lines if ": made:" in line]
    assert made == ["select", "prune", "align", "train", "compact", "recover", "export", "evaluate"]
    assert "select: changed: ffn_ratio changed: 0.3 -> 0.5" in recorder.lines
    assert "train: changed: runs again because prune changed" in recorder.lines


def test_a_new_budget_needs_no_new_scores(finished: Path, tmp_path: Path) -> None:
    settings = ("decompose.budget=5bits", f"run={tmp_path / 'run'}")
    compile_model(load(finished / "tiny.yaml", (f"run={tmp_path / 'run'}",)), Recorder(), until="allocate")
    recorder = Recorder()
    compile_model(load(finished / "tiny.yaml", settings), recorder, until="allocate")
    made = [line.partition(":")[0] for line in recorder.lines if ": made:" in line]
    assert made == ["allocate"]


@pytest.mark.parametrize(
    "changes",
    [
        {"rules": [{"layers": [-1], "roles": ["down"], "bits": 2, "block_size": 32}]},
        {"ties": [["q", "k", "v"], "*.gate_proj", "*.down_proj"]},
    ],
)
def test_new_rules_and_ties_need_no_new_scores(finished: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tmp_path / "ruled.yaml"
    settings = yaml.safe_load((finished / "tiny.yaml").read_text()) | {"run": str(tmp_path / "run")}
    config.write_text(yaml.safe_dump(settings))
    compile_model(load(config), Recorder(), until="decompose")
    settings["decompose"] |= changes
    config.write_text(yaml.safe_dump(settings))
    recorder = Recorder()
    compile_model(load(config), recorder, until="decompose")
    assert [line.partition(":")[0] for line in recorder.lines if ": made:" in line] == ["allocate", "decompose"]
    # The change is told once, by the stage that heeds it.
    assert [line for line in recorder.lines if line.startswith("decompose: changed")] == [
        "decompose: changed: runs again because allocate changed"
    ]
    body = json.loads((tmp_path / "run/allocate/allocation.json").read_text())
    first, last = (read_allocation(body)[f"model.layers.{layer}.mlp.down_proj"] for layer in range(2))
    assert first == last if "ties" in changes else (last.bits, last.block_size) == (2, 32)
    assert len(list(verify_path(tmp_path / "run"))) == 5


def test_budget_in_bytes_counts_the_whole_model(finished: Path, tmp_path: Path) -> None:
    budget = 140_000
    settings = (f"decompose.budget={budget}B", f"run={tmp_path / 'run'}")
    artifacts = compile_model(load(finished / "tiny.yaml", settings), Recorder(), until="decompose")
    size = (artifacts["decompose"].folder / "model.safetensors").stat().st_size
    assert 0.9 * budget < size <= budget


def test_from_makes_a_stage_anew_with_the_same_bytes(finished: Path) -> None:
    before, recorder = hashes(finished / "run"), Recorder()
    compile_model(load(finished / "tiny.yaml", ()), recorder, start="recover")
    made = [line.partition(":")[0] for line in recorder.lines if ": made:" in line]
    assert made == ["recover", "export", "evaluate"]
    assert hashes(finished / "run") == before


def test_instructions_that_share_rows_go_through_the_chain(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    save_texts(tmp_path)
    lines = [{"instruction": f"Say {n}.", "input": "now" * (n % 2), "output": f"it is {n}"} for n in range(120)]
    (tmp_path / "alpaca.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"source": str(tmp_path / "alpaca.jsonl"), "format": "alpaca"}
    packed = {"packing": True, "length": 200, "batch_size": 1}
    config = load(save_settings(tmp_path, data={"task": task}, train=packed, compact=packed), ())
    artifacts = compile_model(config, Recorder())
    for settings in (config.train, config.compact):
        rows = task_rows(context_of(config, artifacts), settings)
        assert len(rows) == settings.steps
        assert all(len(row.lengths) > 1 and len(row.input_ids) <= 200 for row in rows)
    assert read_manifest(artifacts["train"].folder).settings["packing"]

"""Bad input: a typed error, exit code 2, one paragraph, nothing half-written."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.cli import main
from qlora_pipe.known import CHAIN

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_model(tmp_path / "model")
    save_texts(tmp_path)
    save_settings(tmp_path)
    return tmp_path


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["run", str(folder / "tiny.yaml"), *options])


def refused(result: Result, folder: Path, error: str, *words: str) -> None:
    """Exit code 2, the typed error with these words in one paragraph, and no artifact that is not whole."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith(f"{error}: ")]
    assert len(lines) == 1, result.output
    for word in words:
        assert word in lines[0]
    for stage in CHAIN:
        if (folder / "run" / stage).exists():
            assert (folder / "run" / stage / "manifest.json").exists()
    assert not list((folder / "run").glob(".work/*.tmp"))


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing_model(folder: Path) -> None:
    refused(run(folder, "--set", f"model={folder / 'nowhere'}"), folder, "SourceError", "nowhere", "config.json")


def test_missing_package(folder: Path) -> None:
    refused(run(folder, "--set", "model=package:no-such-package"), folder, "SourceError", "pip install")


def test_missing_data_file(folder: Path) -> None:
    result = run(folder, "--set", f"data.calibration={folder / 'gone.txt'}")
    refused(result, folder, "SourceError", "gone.txt")


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(run(folder), folder, "SourceError", "truncated", "model.safetensors")


def test_header_that_lies_about_its_length(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    refused(run(folder), folder, "SourceError", "header")


def test_integer_weights(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].to(torch.int8)}))
    refused(run(folder), folder, "WeightError", QUERY, "floating point")


def test_a_matrix_that_its_format_cannot_hold_is_named(folder: Path) -> None:
    def outgrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][0, 0] = 1e6

    rewrite(folder, outgrow)
    result = run(folder, "--set", "decompose.scale_dtypes=[float16]")
    refused(result, folder, "StageError", QUERY.removesuffix(".weight"), "float16", "use bfloat16 or float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_are_named(folder: Path, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[QUERY][3, 4] = value

    rewrite(folder, poison)
    refused(run(folder), folder, "WeightError", QUERY, "1 NaN or Inf")


def test_unknown_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.mlp.router.weight": torch.zeros(2, 2)}))
    refused(run(folder), folder, "UnsupportedModel", "router")


def test_unknown_family(folder: Path) -> None:
    path = folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mixtral"}))
    refused(run(folder), folder, "UnsupportedModel", "mixtral", "qwen2")


def test_budget_below_the_minimum_states_it(folder: Path) -> None:
    result = run(folder, "--set", "decompose.budget=2bits")
    refused(result, folder, "BudgetError", "smallest that works is")
    smallest = float(result.output.split("smallest that works is ")[1].split()[0])
    assert 2 < smallest < 6
    assert run(folder, "--set", f"decompose.budget={smallest + 0.001}bits", "--until", "allocate").exit_code == 0


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("[{name: '*.x', bits: 2}]", ["decompose.rules.0", "is for no matrix"]),
        ("[{roles: [down], bits: 8}]", ["decompose.rules.0", "leaves model.layers.0.mlp.down_proj"]),
        ("[{roles: [q], bits: 2}, {roles: [k], bits: 3}]", ["tied", "q_proj may take bits 2"]),
    ],
)
def test_rules_that_cannot_hold_are_found_by_the_plan(folder: Path, rules: str, words: list[str]) -> None:
    settings = yaml.safe_load((folder / "tiny.yaml").read_text())
    settings["decompose"]["rules"] = yaml.safe_load(rules)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    # Headers alone: not a weight can be read.
    path = folder / "model/model.safetensors"
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(path.read_bytes()[:head] + b"\xff" * (path.stat().st_size - head))
    for command in ("plan", "run"):
        result = CliRunner().invoke(main, [command, str(folder / "tiny.yaml")])
        refused(result, folder, "ConfigError", *words)
    assert not (folder / "run/source").exists()


def test_byte_budget_below_the_fixed_part(folder: Path) -> None:
    refused(run(folder, "--set", "decompose.budget=10KB"), folder, "BudgetError", "embeddings")


@pytest.mark.parametrize(("setting", "word"), [("prune.kv_ratio=0.9", "kv_ratio"), ("prune.ffn_ratio=0.999", "ffn")])
def test_ratio_that_empties_a_layer(folder: Path, setting: str, word: str) -> None:
    refused(run(folder, "--set", setting), folder, "ConfigError", "largest that works")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["prune.ratio=0.9"], ["prune.ratio 0.9 would empty layers", "largest that works is 0.7"]),
        (
            ["prune.ratio=0.6", "prune.protect_first=1"],
            ["protected layers and norms take", "works is 0.3"],
        ),
        (["prune.ratio=0.1", "prune.protect_first=2"], ["cover all 2 layers"]),
        (
            ["prune.ratio=0.1", "prune.widths=allocated", "prune.losses=scores", "prune.method=magnitude"],
            ["magnitude", "across layers"],
        ),
        (["prune.widths=allocated"], ["prune", "set ratio"]),
    ],
)
def test_reductions_that_cannot_be_had(folder: Path, settings: list[str], words: list[str]) -> None:
    options = [part for setting in (*settings, "export.small=false") for part in ("--set", setting)]
    refused(run(folder, *options), folder, "ConfigError", *words)
    assert not (folder / "run/source").exists()


def test_ratio_outside_its_range(folder: Path) -> None:
    refused(run(folder, "--set", "prune.ffn_ratio=1.0"), folder, "ConfigError", "prune.ffn_ratio")


def test_empty_dataset(folder: Path) -> None:
    (folder / "records.json").write_text("[]")
    refused(run(folder), folder, "DataError", "records.json")


def test_too_little_held_out_is_refused_before_any_stage(folder: Path) -> None:
    refused(run(folder, "--set", "recover.rows=24"), folder, "DataError", "24 records are held out", "recover.rows")
    assert not (folder / "run/source").exists()


@pytest.mark.parametrize("name", ["task", "../x", "a/b", ""])
def test_a_name_of_a_text_that_cannot_be_a_file(folder: Path, name: str) -> None:
    path = folder / "tiny.yaml"
    path.write_text(path.read_text().replace("    text: ", f"    '{name}': "))
    refused(run(folder), folder, "ConfigError", "evaluation")


def test_empty_text(folder: Path) -> None:
    (folder / "text.txt").write_text("")
    refused(run(folder), folder, "DataError", "text.txt")


def test_record_without_the_field(folder: Path) -> None:
    (folder / "records.json").write_text(json.dumps([{"name": "a", "extract": "b"}]))
    refused(run(folder), folder, "DataError", "'title'", "extract, name")


def test_device_not_present(folder: Path) -> None:
    refused(run(folder, "--set", "device=cuda:7"), folder, "DeviceError", "cuda:7")
    refused(run(folder, "--set", "device=gpu"), folder, "DeviceError", "gpu")


def test_disk_full_keeps_what_is_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TensorWriter, "write", full)
        refused(run(folder), folder, "StageError", "calibrate", "full")
    assert (folder / "run/source/manifest.json").exists()
    assert run(folder, "--until", "calibrate").exit_code == 0


def test_a_full_disk_is_named_whatever_the_library_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(TensorWriter, "write", broken)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    refused(run(folder), folder, "StageError", "calibrate", "full")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), ["out of memory", "plan"]),
        (torch.OutOfMemoryError("CUDA out of memory"), ["out of memory", "batch_size"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["out of memory", "batch_size"]),
        (OSError(errno.EIO, "Input/output error", "model.safetensors"), ["Input/output error (model.safetensors)"]),
    ],
)
def test_trouble_of_the_machine_names_the_stage(
    folder: Path, error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: TensorWriter, name: str, tensor: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(TensorWriter, "write", broken)
    refused(run(folder), folder, "StageError", "calibrate: ", *words)


def test_memory_limit_is_enforced_before_any_stage(folder: Path) -> None:
    refused(run(folder, "--set", "memory.host=1MB"), folder, "PlanError", "memory.host")
    assert not (folder / "run/source").exists()


def test_a_group_size_that_does_not_divide(folder: Path) -> None:
    refused(run(folder, "--set", "compact.group_size=48"), folder, "ConfigError", "group_size 48")


def test_a_block_size_that_does_not_divide(folder: Path) -> None:
    refused(run(folder, "--set", "decompose.block_sizes=[48]"), folder, "ConfigError", "block size")


def test_nan_loss_stops_with_the_step(folder: Path) -> None:
    refused(run(folder, "--set", "train.learning_rate=1e30"), folder, "StageError", "learning rate")


def test_a_second_run_in_the_same_folder_is_refused(folder: Path) -> None:
    from qlora_pipe.artifacts.store import Store

    with Store(folder / "run").lock():
        refused(run(folder), folder, "ArtifactError", "another run")


def test_from_needs_what_comes_before(folder: Path) -> None:
    refused(run(folder, "--from", "train"), folder, "ArtifactError", "source is not done")

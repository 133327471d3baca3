import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.errors import PlanError, SourceError, UnsupportedModel
from qlora_pipe.known import CHAIN
from qlora_pipe.memory import RUNTIME_BYTES
from qlora_pipe.plan import Plan, check_memory, know, make_plan, plan_known, render_plan
from quant.storage import Choice

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_tiny_model(folder / "model", num_hidden_layers=4)
    save_texts(folder)
    save_settings(folder)
    return folder


def configure(folder: Path, *overrides: str) -> Config:
    return load(folder / "tiny.yaml", overrides)


def peaks(folder: Path, stage: str, *overrides: str) -> tuple[int, int]:
    plan = make_plan(configure(folder, *overrides))
    found = next(row for row in plan.stages if row.name == stage)
    return found.host_peak, found.device_peak


def test_the_stages_are_the_chain_with_the_files_that_are_known(folder: Path) -> None:
    config = configure(folder)
    known, plan = know(config), make_plan(config)
    assert tuple(stage.name for stage in plan.stages) == CHAIN
    for stage in plan.stages:
        assert stage.files == known.files(stage.name)
        assert stage.writes == sum(stage.files.values())
        assert stage.reads == known.reads(stage.name)
        assert stage.tensors == known.tensor_count(stage.name)
    assert plan.disk == sum(stage.writes for stage in plan.stages)
    assert plan.host_peak == max(stage.host_peak for stage in plan.stages)


def test_reads_are_the_bytes_of_the_checkpoint(folder: Path) -> None:
    stage = next(row for row in make_plan(configure(folder)).stages if row.name == "source")
    file = folder / "model/model.safetensors"
    head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert stage.reads == file.stat().st_size - head


def test_an_estimate_says_so_and_the_solved_allocation_is_exact(folder: Path) -> None:
    known = know(configure(folder))
    plan = plan_known(known)
    assert not plan.exact
    assert "an estimate until allocate has run" in render_plan(plan)
    final = plan_known(known.with_allocation(dict.fromkeys(known.allocation, Choice("nf", 2, 32, 4))))
    assert final.exact
    assert "estimate" not in render_plan(final)
    differing = [a.name for a, b in zip(plan.stages, final.stages, strict=True) if a.files != b.files]
    assert differing == ["decompose", "prune"]


def test_the_table_shows_every_stage(folder: Path) -> None:
    lines = render_plan(make_plan(configure(folder))).splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(CHAIN)]] == list(CHAIN)
    assert lines[0].endswith(str(folder / "run"))
    assert len({len(line) for line in lines[1 : 2 + len(CHAIN)]}) == 1


def test_the_plan_is_json(folder: Path) -> None:
    plan = make_plan(configure(folder))
    body = json.loads(json.dumps(plan.to_json()))
    assert body["stages"][4]["files"] == plan.stages[4].files
    assert body["fits_host"] is None


@pytest.mark.parametrize("stage", ["train", "compact"])
@pytest.mark.parametrize("setting", ["batch_size", "length"])
def test_the_peak_grows_with_the_batch(folder: Path, stage: str, setting: str) -> None:
    found = [peaks(folder, stage, f"{stage}.{setting}={value}")[0] for value in (1, 2, 64, 128, 4096)]
    assert found == sorted(found)
    assert len(set(found[1:])) == 4


@pytest.mark.parametrize("stage", ["train", "compact"])
def test_activation_checkpointing_lowers_the_peak(folder: Path, stage: str) -> None:
    batch = (f"{stage}.batch_size=8", f"{stage}.length=512")
    assert peaks(folder, stage, *batch, f"{stage}.activation_checkpointing=true") < peaks(folder, stage, *batch)


def test_accumulation_costs_nothing(folder: Path) -> None:
    assert peaks(folder, "train", "train.accumulation=16") == peaks(folder, "train")


def test_a_device_takes_the_training_off_the_host(folder: Path) -> None:
    small, large = (("train.batch_size=4", "train.length=512"), ("train.batch_size=64", "train.length=512"))
    assert peaks(folder, "train", *large)[1] == 0
    (host, device), (same_host, more) = (peaks(folder, "train", *batch, "device=cuda") for batch in (small, large))
    assert host == same_host < peaks(folder, "train", *large)[0]
    assert 0 < device < more
    # What streams from disk to disk needs no device.
    assert peaks(folder, "decompose", "device=cuda") == peaks(folder, "decompose")
    assert peaks(folder, "calibrate", "device=cuda", "dtype=bfloat16")[1] < peaks(folder, "calibrate", "device=cuda")[1]


def test_calibration_needs_no_more_for_a_deeper_model(folder: Path, tmp_path: Path) -> None:
    found = []
    for layers in (2, 32):
        save_tiny_model(tmp_path / "model", num_hidden_layers=layers, vocab_size=4000, hidden_size=256)
        found.append(peaks(folder, "calibrate", f"model={tmp_path / 'model'}")[0] - RUNTIME_BYTES)
    assert found[0] < found[1] < 1.1 * found[0]


def test_calibration_plans_for_its_covariances(folder: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model", intermediate_size=1024)
    of = f"model={tmp_path / 'model'}"
    with_sums, without = (peaks(folder, "calibrate", of, f"calibrate.covariance={value}")[0] for value in (True, False))
    assert 0.7 * 8 * 1024**2 < with_sums - without <= 8 * (1024**2 + 3 * 64**2)


def test_calibration_plans_for_the_gates_of_every_sequence(folder: Path) -> None:
    many, few = (
        peaks(folder, "calibrate", f"calibrate.sequences={count}", f"calibrate.length={256 // count}")[0]
        for count in (64, 4)
    )
    # 64 inputs of o and 192 of down in 4 layers, float64.
    assert many - few == 8 * (64 - 4) * 4 * (64 + 192)


def test_loraprune_is_planned_for_the_full_model(folder: Path) -> None:
    """While groups are masked nothing is small yet; alignment is planned where it is done."""
    lora, large = ("prune.method=lora", "export.small=false"), ("guide.batch_size=64", "guide.length=2048")
    assert peaks(folder, "select", *lora, *large)[0] > 3 * peaks(folder, "select", "prune.method=magnitude")[0]
    half, none = (peaks(folder, "select", *lora, *large, f"prune.ffn_ratio={ratio}")[0] for ratio in (0.5, 0.0))
    assert half == none
    many = ("align.steps=100000", "align.length=2048")
    assert peaks(folder, "align", *lora, *many) == peaks(folder, "align", *lora)
    aligned = (*lora, "align.enabled=true")
    assert peaks(folder, "align", *aligned, *many)[0] > 2 * peaks(folder, "align", *aligned)[0]


@pytest.mark.parametrize("stage", ["align", "train", "compact"])
def test_a_teacher_is_read_and_its_tokens_are_planned_for(folder: Path, stage: str) -> None:
    batch = ("align.enabled=true", f"{stage}.steps=50", f"{stage}.batch_size=4", f"{stage}.length=128")
    batch += (f"{stage}.accumulation=2",)
    without, few, many = (
        (*batch, f"{stage}.teacher={teacher}", f"{stage}.top={top}")
        for teacher, top in (("none", 64), ("original", 4), ("original", 64))
    )
    assert peaks(folder, stage, *many)[0] - peaks(folder, stage, *few)[0] == 8 * (64 - 4) * 50 * 4 * 2 * 128
    assert peaks(folder, stage, *few)[0] > peaks(folder, stage, *without)[0]
    known, alone = (know(configure(folder, *given)) for given in (few, without))
    # The integer model starts from the original's weights.
    assert known.reads(stage) - alone.reads(stage) == (0 if stage == "compact" else known.base_bytes())


def limited(folder: Path, *overrides: str) -> tuple[Config, Plan]:
    config = configure(folder, *overrides)
    return config, make_plan(config)


def test_memory_limits(folder: Path) -> None:
    peak = make_plan(configure(folder)).host_peak
    for limit, fits, word in ((peak, True, "(fits)"), (peak - 1, False, "(DOES NOT FIT)")):
        config, plan = limited(folder, f"memory.host={limit}B")
        assert plan.fits_host is fits
        assert plan.fits_device is None
        assert word in render_plan(plan)
        if fits:
            check_memory(plan, config)
    worst = max(plan.stages, key=lambda stage: stage.host_peak).name
    with pytest.raises(PlanError, match=rf"stage {worst} needs .* of host memory, memory.host allows {peak - 1}B"):
        check_memory(plan, config)


def test_device_limits(folder: Path) -> None:
    config, plan = limited(folder, "memory.device=0B")
    check_memory(plan, config)
    config, plan = limited(folder, "memory.device=1KB", "device=cuda")
    with pytest.raises(PlanError, match=r"of device memory, memory\.device allows 1KB"):
        check_memory(plan, config)


@pytest.mark.parametrize(
    ("override", "error", "word"),
    [
        ("model=/nowhere/at/all", SourceError, "found nothing"),
        ("model=owner/name", SourceError, "a plan downloads nothing"),
    ],
)
def test_what_a_run_would_refuse_is_refused(folder: Path, override: str, error: Any, word: str) -> None:
    with pytest.raises(error, match=word):
        make_plan(configure(folder, override))


def test_a_known_folder_stands_in_for_the_model(folder: Path, tmp_path: Path) -> None:
    config = configure(folder, "model=owner/name")
    assert make_plan(config, folder / "model").stages == make_plan(configure(folder)).stages
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(UnsupportedModel, match="mixtral"):
        make_plan(config, tmp_path)


def test_planning_imports_nothing_heavy(folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "qlora_pipe", "plan", str(folder / "tiny.yaml")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, check=True
    )
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert {"qlora_pipe.plan", "pydantic"} <= imported
    heavy = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "matplotlib", "scipy", "pulp", "numpy"}
    assert imported & heavy == set()
    assert done.stdout.rstrip("\n") == render_plan(make_plan(configure(folder)))
    assert not (folder / "run").exists()

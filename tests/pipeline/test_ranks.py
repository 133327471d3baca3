"""Two processes under torchrun make the same bytes as one, and refuse what they cannot share.

Trained values too: a step has two passes here, and a sum of two gradients has no order. More passes would agree to
rounding.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.known import CHAIN
from qlora_pipe.verify import verify_path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_model(folder / "model", num_hidden_layers=3)
    save_texts(folder)
    shared = {"accumulation": 2, "batch_size": 1}
    taught = shared | {"teacher": "original", "top": 8, "packing": True, "length": 128}
    blocks = {"block_rows": 2}
    return save_settings(folder, train=taught, compact=taught | blocks, refine={**shared, "enabled": True, "steps": 2})


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [*command, "-m", "qlora_pipe", *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_two_processes_make_what_one_makes(config: Path) -> None:
    alone, together = config.parent / "alone", config.parent / "together"
    compile_model(load(config, (f"run={alone}",)), Reporter(json_lines=True), until="recover")
    done = torchrun("recover", str(config), "--set", f"run={together}", "--log-json")
    assert done.returncode == 0, done.stderr
    for stage in CHAIN[: CHAIN.index("recover") + 1]:
        assert read_manifest(together / stage).files == read_manifest(alone / stage).files, stage
    list(verify_path(together))
    # One rank speaks, so every stage is told of once.
    made = [json.loads(line) for line in done.stderr.splitlines() if line.startswith('{"time"')]
    stages = [event["stage"] for event in made if event["event"] == "made"]
    assert len(stages) == len(set(stages))
    assert {"score", "refine", "train", "compact", "recover"} <= set(stages)


def test_one_of_two_processes_tells_of_a_run_made_again(config: Path) -> None:
    run = config.parent / "scored"
    compile_model(load(config, (f"run={run}",)), Reporter(json_lines=True), until="score")
    done = torchrun("reproduce", str(run))
    assert done.returncode == 0, done.stderr
    same = [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" the same")]
    assert same == ["source", "calibrate", "score"]
    assert done.stdout.count("processes 1, now 2") == done.stdout.count("made again in") == 1


def test_passes_that_cannot_be_shared_are_refused(config: Path) -> None:
    refused = torchrun("run", str(config), "--set", f"run={config.parent / 'refused'}", "--set", "train.accumulation=3")
    assert refused.returncode != 0
    assert "expected train.accumulation to be a multiple of 2, found 3" in refused.stderr

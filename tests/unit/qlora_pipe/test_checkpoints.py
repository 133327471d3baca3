"""What checkpoints take on disk while stages train, beside what the plan says."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.training import _SlotTrainer

GUIDED = ("prune.method=lora", "guide.steps=4", "guide.save_steps=2", "guide.interval=1", "align.rank=2")
REFINED = ("refine.enabled=true", "refine.steps=1", "refine.length=40")
LOW_RANK = ("train.low_rank=trained", "compact.warm_start=false")


def weight(folder: Path) -> int:
    """Bytes of the trained values in a checkpoint, and of their moments."""
    values = sum(tensor.nbytes for tensor in load_file(folder / "slots.safetensors").values())
    states = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    return values + sum(state[moment].nbytes for state in states for moment in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("more", [(*GUIDED, *REFINED), LOW_RANK, ("compact.method=lsq",)])
def test_checkpoints_are_planned_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    save_tiny_model(tmp_path / "model")
    save_texts(tmp_path)
    config = load(save_settings(tmp_path), (*more, "train.save_steps=1"))
    found, keep = Counter[str](), _SlotTrainer._save_checkpoint

    def kept(trainer: _SlotTrainer, *rest: object) -> None:
        folder = Path(trainer.args.output_dir)
        before = [weight(path) for path in folder.glob("checkpoint-*")]
        keep(trainer, *rest)
        # Those of before are there while the new one is written.
        step = trainer.state.global_step
        now = weight(folder / f"checkpoint-{step}")
        stage = folder.name.partition("-")[0]
        found[stage] = max(found[stage], sum(before) + now)

    monkeypatch.setattr(_SlotTrainer, "_save_checkpoint", kept)
    compile_model(config, Reporter(json_lines=True), until="compact")
    # As it is once bits are allocated.
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    planned = {stage["name"]: stage["scratch"] for stage in plan["stages"] if stage["scratch"]}
    assert planned.pop("calibrate")
    assert planned == found

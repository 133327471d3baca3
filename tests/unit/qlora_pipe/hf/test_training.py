"""The training loop on a tiny model: what it computes, how it resumes, when it stops."""

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows
from torch import Tensor
from transformers import PreTrainedModel

from qlora_pipe.config_training import Optimisation
from qlora_pipe.errors import StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import score, summed_loss
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.training import train, trained_parameters

ROWS = byte_rows([f"row {n} says {'abcdefgh'[n % 8] * (3 + 5 * (n % 3))}." for n in range(12)], ignored=4)

MAKE = {"packed": TinyFolder.packed, "wide": lambda tiny: tiny.packed(rank=64), "l4q": TinyFolder.l4q}


class Stopped(Exception):
    """The process ends here."""


class Recorder(Reporter):
    """Keeps events, and stops after so many steps if told to."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stream=io.StringIO())
        self.lines: list[str] = []
        self.steps, self.open = 0, 0
        self._stop_after = stop_after

    def event(self, kind: str, message: str, **fields: Any) -> None:
        self.lines.append(f"{kind}: {message}")

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[], None]]:
        def advance() -> None:
            self.steps += 1
            if self.steps == self._stop_after:
                raise Stopped

        self.open += 1
        try:
            yield advance
        finally:
            self.open -= 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    return TinyFolder(save_tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.1))


def settings(**changes: Any) -> Optimisation:
    plain = {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "warmup": 0.0, "save_steps": 100}
    return Optimisation(**(plain | changes))


def run(
    model: Model, work: Path, reporter: Recorder | None = None, step_rate: float | None = None, **changes: Any
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Trained parameters and the log."""
    log = train(
        model,
        ROWS,
        settings(**changes),
        work=work,
        seed=0,
        device="cpu",
        reporter=reporter or Recorder(),
        step_rate=step_rate,
    )
    return {name: tensor.clone() for name, tensor in trained_parameters(model).items()}, log


def test_loss_falls_and_only_the_adapter_moves(tiny: TinyFolder, tmp_path: Path) -> None:
    model, recorder = tiny.packed(), Recorder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _, log = run(model, tmp_path, recorder, steps=40, learning_rate=1e-2)
    assert [row["step"] for row in log] == list(range(1, 41))
    assert set(log[0]) == {"step", "loss", "learning_rate", "grad_norm"}
    first, last = (math.fsum(row["loss"] for row in part) / 5 for part in (log[:5], log[-5:]))
    assert last < 0.7 * first
    assert recorder.steps == 40
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    adapters = {name for name in before if name.endswith((".task_a", ".task_b"))}
    assert moved == adapters
    assert len(adapters) == 2 * 2 * 7
    assert set(trained_parameters(model)) == adapters


def test_accumulation_of_two_equals_a_batch_of_two(tiny: TinyFolder, tmp_path: Path) -> None:
    """Tolerance 1e-5 relative for losses; a hundredth of the learning rate for parameters: Adam divides by noise."""
    together, log = run(tiny.packed(), tmp_path / "a", batch_size=2, accumulation=1)
    apart, other = run(tiny.packed(), tmp_path / "b", batch_size=1, accumulation=2)
    assert len({row.scored for row in ROWS}) > 1, "a mean of means would differ"
    for mine, theirs in zip(log, other, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    for name, tensor in together.items():
        torch.testing.assert_close(apart[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_the_loss_of_a_step_is_the_mean_over_its_scored_tokens(tiny: TinyFolder, tmp_path: Path) -> None:
    """Of plain text too, whose first tokens are labels that nothing predicts."""
    rows, model = byte_rows([f"row {n} says {'abcdefgh'[n]}" for n in range(8)]), tiny.packed()
    expected = score(model, rows).loss
    log = train(
        model,
        rows,
        settings(steps=1, batch_size=4, accumulation=2),
        work=tmp_path,
        seed=0,
        device="cpu",
        reporter=Recorder(),
    )
    assert log[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_activation_checkpointing_changes_nothing_but_work(tiny: TinyFolder, tmp_path: Path) -> None:
    results, calls = [], []
    for choice in (False, True):
        model, count = tiny.packed(), []
        model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(lambda *_, count=count: count.append(1))
        results.append(run(model, tmp_path / str(choice), activation_checkpointing=choice, steps=3))
        calls.append(len(count))
    assert calls == [3, 6], "recomputed in the backward pass"
    (plain, plain_log), (again, again_log) = results
    assert plain_log == again_log
    for name, tensor in plain.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    ("kind", "optimizer", "cut"),
    [("packed", "adamw", "unmarked"), ("l4q", "adamw", "truncated"), ("wide", "adamw_8bit", "unmarked")],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    tiny: TinyFolder, tmp_path: Path, kind: str, optimizer: str, cut: str
) -> None:
    def again(work: Path, reporter: Recorder) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        return run(MAKE[kind](tiny), work, reporter, step_rate=1e-3, steps=7, save_steps=2, optimizer=optimizer)

    expected, log = again(tmp_path / "calm", Recorder())

    work, stopped = tmp_path / "work", Recorder(stop_after=5)
    with pytest.raises(Stopped) as caught:
        again(work, stopped)
    assert stopped.open == 0, f"the progress bar is closed while {caught.type} is on its way"
    half = work / "checkpoint-5"
    shutil.copytree(work / "checkpoint-4", half)
    if cut == "unmarked":
        (half / "whole.json").unlink()
    slots = half / "slots.safetensors"
    slots.write_bytes(slots.read_bytes()[:-40])

    resumed = Recorder()
    found, tail = again(work, resumed)
    assert resumed.lines == ["resume: going on from step 4 of 7"]
    assert resumed.steps == 3
    assert not half.exists()
    assert tail == log
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_without_a_whole_checkpoint_training_starts_over(tiny: TinyFolder, tmp_path: Path) -> None:
    expected, _ = run(tiny.packed(), tmp_path / "calm", steps=3)
    (tmp_path / "work/checkpoint-2").mkdir(parents=True)
    (tmp_path / "work/checkpoint-2/whole.json").write_text(json.dumps({"slots.safetensors": "0" * 64}))
    recorder = Recorder()
    found, _ = run(tiny.packed(), tmp_path / "work", recorder, steps=3)
    assert recorder.lines == []
    assert not (tmp_path / "work/checkpoint-2").exists()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_checkpoints_hold_the_adapter_only(tiny: TinyFolder, tmp_path: Path) -> None:
    model = tiny.packed()
    run(model, tmp_path, steps=6, save_steps=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    trained = sum(4 * tensor.numel() for tensor in trained_parameters(model).values())
    assert (tmp_path / "checkpoint-6/slots.safetensors").stat().st_size < trained + 8000


def test_a_nan_loss_stops_the_run_and_names_the_step_and_its_rows(tiny: TinyFolder, tmp_path: Path) -> None:
    reporter = Recorder()
    with pytest.raises(StageError, match=r"the loss is nan at step 2, .*lower the learning rate") as caught:
        # A step of this length leaves no finite activation.
        run(tiny.packed(), tmp_path, reporter, learning_rate=1e25, schedule="constant")
    assert reporter.open == 0, f"the progress bar is closed while {caught.type} is on its way"
    named = re.search(r"on the training rows (\d+), (\d+) \(", str(caught.value))
    assert named is not None
    seen: list[list[int]] = []

    def seeing(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
        seen.extend(batch["input_ids"].tolist())
        return summed_loss(model, batch)

    given = {"work": tmp_path / "again", "seed": 0, "device": "cpu", "reporter": Recorder(), "loss": seeing}
    train(tiny.packed(), ROWS, settings(steps=2), **given)
    for number in map(int, named.groups()):
        ids = list(ROWS[number].input_ids)
        assert any(row[: len(ids)] == ids and not any(row[len(ids) :]) for row in seen[2:])


def test_step_sizes_that_fall_to_the_floor_are_told_of(tiny: TinyFolder, tmp_path: Path) -> None:
    reporter, model = Recorder(), tiny.l4q()
    found, _ = run(model, tmp_path, reporter, step_rate=1.0, steps=2, schedule="constant")
    assert min(tensor.min() for name, tensor in found.items() if name.endswith(".scale")) == pytest.approx(6.2e-5)
    (line,) = reporter.lines
    assert re.fullmatch(r"steps: step sizes were raised .* (\d+) times, most often in model\.layers.*step_rate\)", line)
    calm = Recorder()
    run(tiny.l4q(), tmp_path / "calm", calm, step_rate=1e-5, steps=2)
    assert calm.lines == []


def test_a_last_step_that_breaks_the_adapter_is_an_error(tiny: TinyFolder, tmp_path: Path) -> None:
    model = tiny.packed()
    name = "model.layers.0.mlp.up_proj.task_b"
    model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(StageError, match=r"after step 1 model\..* is not finite"):
        run(model, tmp_path, steps=1)


def test_step_sizes_learn_at_their_rate_and_do_not_decay(tiny: TinyFolder, tmp_path: Path) -> None:
    """Adam's first step moves every value by its rate; decoupled decay would add rate x decay x value to it."""
    model = tiny.l4q()
    start = {name: tensor.clone() for name, tensor in trained_parameters(model).items()}
    rate, step_rate, decay = 1e-3, 1e-4, 0.5
    found, _ = run(
        model, tmp_path, step_rate=step_rate, steps=1, learning_rate=rate, weight_decay=decay, schedule="constant"
    )
    for name, tensor in found.items():
        moved = (tensor - start[name]).abs()
        if name.endswith(".scale"):
            assert moved.median() == pytest.approx(step_rate, rel=1e-2), name
            assert moved.max() < 1.01 * step_rate, name
            assert start[name].max() * decay > 0.02, "decay would show"
        elif name.endswith(".lora_a"):
            # B is zero, so A has no gradient yet: it decays and does nothing else.
            torch.testing.assert_close(tensor, start[name] * (1 - rate * decay), rtol=1e-6, atol=0)
        else:
            assert moved.median() == pytest.approx(rate, rel=1e-2), name


def test_eight_bit_adam_keeps_eight_bit_moments(tiny: TinyFolder, tmp_path: Path) -> None:
    """bitsandbytes quantises the moments of tensors with at least 4096 values."""
    model = tiny.packed(rank=64)
    _, log = run(model, tmp_path, optimizer="adamw_8bit", steps=20, save_steps=20, learning_rate=5e-3)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    saved = torch.load(tmp_path / "checkpoint-20/optimizer.pt", weights_only=True)
    moments = [tensor for tensor in tensors_in(saved) if tensor.numel() >= 4096]
    assert moments
    assert {tensor.dtype for tensor in moments} == {torch.uint8}


def tensors_in(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from tensors_in(branch)

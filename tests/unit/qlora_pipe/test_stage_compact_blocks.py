"""The integer model tuned block by block, what it is led to, and what trains on from it; and no training at all."""

import json
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import Tensor

from qlora_pipe.artifacts.scratch import Scratch
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.hf import blocks, calibration, distill
from qlora_pipe.hf.calibration import batches_of
from qlora_pipe.hf.model import Model, dense_linear
from qlora_pipe.memory import RUNTIME_BYTES
from qlora_pipe.plan import make_plan
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.calibrate import calibration_rows
from qlora_pipe.stages.compact import first_integers
from qlora_pipe.stages.models import (
    compensation,
    integer_model,
    merged_weight,
    sliced_base_model,
    sliced_base_weight,
)
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.stages.train import strength
from quant import grid
from quant.pack import unpack

# A slot C too, so that both slots are part of what is reproduced.
SLOTS = ("align.enabled=true", "align.steps=6", "align.rank=2", "align.learning_rate=0.02", "train.learning_rate=0.02")
BITS = (*SLOTS, "compact.bits=3", "compact.length=40", "compact.batch_size=2", "compact.steps=0")
BLOCKS = (*BITS, "compact.block_rows=6", "compact.block_epochs=8", "compact.block_rate=1e-3")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    # Layers that differ, so that those of the small model are its own.
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder, prune={"protect_first": 1})


@pytest.fixture(scope="module", autouse=True)
def aside() -> Iterator[dict[str, int]]:
    """The most bytes that each stage puts aside on disk."""
    found = Counter[str]()

    class Weighed(Scratch):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self._stage = folder.name.partition("-")[0]

        def write(self, key: Hashable, tensor: Tensor) -> None:
            super().write(key, tensor)
            found[self._stage] = max(found[self._stage], self.nbytes)

    with pytest.MonkeyPatch.context() as patch:
        for user in (blocks, calibration, distill):
            patch.setattr(user, "Scratch", Weighed)
        yield found


def made(config: Path, overrides: tuple[str, ...], until: str = "compact") -> tuple[Context, dict[str, Artifact]]:
    settings = load(config, overrides)
    artifacts = compile_model(settings, Reporter(json_lines=True), until=until)
    return context_of(settings, artifacts), artifacts


@pytest.fixture(scope="module")
def rounded(config: Path) -> tuple[Context, Model]:
    """The integer model that nothing has trained."""
    seen, artifacts = made(config, BITS, until="recover")
    assert json.loads((artifacts["compact"].folder / "history.json").read_text()) == []
    return seen, integer_model(seen, seen.reader("compact"))


def target(seen: Context, name: str, weight: Tensor) -> Tensor:
    """The kept block of the original weight with both slots."""
    task = merged_weight(weight, *read_factors(seen.reader("train", "adapter").read, name), strength(seen))
    return merged_weight(task, *compensation(seen, name), 1.0)


def test_without_steps_the_integers_are_the_rounded_target(rounded: tuple[Context, Model]) -> None:
    seen, _ = rounded
    first, reader = first_integers(seen), seen.reader("compact")
    for layer, role, name in seen.known.small.linears():
        weight, _ = sliced_base_weight(seen, layer, role, name)
        codes, scale, _ = first(name, target(seen, name, weight))
        found = grid.to_signed(unpack(reader.read(f"{name}.codes"), 3, weight.shape[1]), 3)
        assert (found == codes).double().mean() > 0.999
        torch.testing.assert_close(reader.read(f"{name}.scale"), scale, rtol=1e-5, atol=1e-9)


def relative_error(found: Model, wanted: Model, batches: list[dict[str, Tensor]]) -> float:
    """Of what leaves the first layer, over all tokens, in fp64."""
    errors = []
    for inputs in batches:
        output, expected = first_output(found, inputs), first_output(wanted, inputs)
        errors.append(((output - expected).square().sum(-1) / expected.square().sum(-1)).flatten())
    return float(torch.cat(errors).mean())


def first_output(model: Model, inputs: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out.double()))
    with torch.no_grad():
        model(input_ids=inputs["input_ids"])
    hook.remove()
    return seen[0]


def test_blocks_are_led_to_the_original_with_both_slots(config: Path, rounded: tuple[Context, Model]) -> None:
    _, before = rounded
    seen, artifacts = made(config, BLOCKS)
    log = json.loads((artifacts["compact"].folder / "blocks.json").read_text())
    wanted = sliced_base_model(seen, lambda name, weight, bias: dense_linear(target(seen, name, weight), bias))
    batches = [batch.inputs for batch in batches_of(calibration_rows(seen, 40, 6), "cpu")]
    after = integer_model(seen, seen.reader("compact"))
    assert log[0]["before"] == pytest.approx(relative_error(before, wanted, batches), rel=1e-3)
    assert log[0]["after"] == pytest.approx(relative_error(after, wanted, batches), rel=1e-3)
    assert all(entry["after"] < 0.98 * entry["before"] for entry in log)


def test_training_goes_on_from_the_tuned_blocks(config: Path) -> None:
    """After one tiny step every integer is the one that the blocks ended with."""
    seen, _ = made(config, BLOCKS)
    before = TensorReader(seen.inputs["compact"].folder)
    expected = {name: before.read(name) for name in before}
    still = ("compact.steps=1", "compact.learning_rate=1e-12", "compact.step_rate=1e-12", "compact.warmup=0")
    seen, artifacts = made(config, (*BLOCKS, *still))
    found = TensorReader(artifacts["compact"].folder)
    for name, tensor in expected.items():
        if name.endswith(".codes"):
            assert torch.equal(found.read(name), tensor), name
        else:
            torch.testing.assert_close(found.read(name), tensor, rtol=1e-6, atol=1e-9)
    assert len(json.loads((artifacts["compact"].folder / "history.json").read_text())) == 1


def test_disk_is_planned_to_the_byte(config: Path, aside: dict[str, int]) -> None:
    """Where no row is short; of train there are checkpoints alone."""
    made(config, BLOCKS)
    planned = {stage.name: stage.scratch for stage in make_plan(load(config, BLOCKS)).stages if stage.scratch}
    assert planned.pop("train")
    assert set(planned) == {"calibrate", "align", "compact"}
    assert planned == aside


def test_two_embeddings_and_a_layer_are_planned_for(config: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, vocab_size=20_000)
    few, peaks = (f"model={tmp_path}", *BITS, "compact.length=8", "compact.batch_size=1"), []
    for given in ((), ("compact.block_rows=6",)):
        plan = make_plan(load(config, (*few, *given)))
        peaks.append(next(stage for stage in plan.stages if stage.name == "compact").host_peak)
    assert peaks[0] < peaks[1]
    assert peaks[1] - RUNTIME_BYTES > 2 * 4 * 20_000 * 64


def test_what_is_refused_and_what_does_not_matter(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher: original is learnt from end to end: set steps"):
        load(config, (*BLOCKS, "compact.teacher=original"))
    unused = {"block_epochs", "block_rate", "block_step_rate"}
    assert not unused & set(load(config, BITS).compact.decisive())
    assert unused <= set(load(config, BLOCKS).compact.decisive())

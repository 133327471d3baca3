"""The methods beside L4Q through the compiler: what was trained is what is stored, evaluated and exported."""

import math
from pathlib import Path

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model
from tiny_training import Trained, logits, trained_run
from torch import Tensor

from prune.groups import shape_of
from qlora_pipe import layouts
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.footprint import ALLOCATOR
from qlora_pipe.plan import know, make_plan
from qlora_pipe.stages import compact
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.compact import compact_model, first_integers
from qlora_pipe.stages.models import integer_modules, integer_weight, merged_weight, sliced_base_weight
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.verify import verify_path
from quant import grid

LARGE_STEPS = ("compact.learning_rate=1e-2", "compact.step_rate=1e-3", "compact.steps=2")
METHODS = {
    "lsq": ("compact.bits=2",),
    "qat-lora": ("compact.bits=3", "compact.base=int8"),
    "qa-lora": ("compact.bits=3", "compact.rank=5", "compact.group_size=16"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module", params=METHODS)
def trained(config: Path, request: pytest.FixtureRequest) -> Trained:
    overrides = (f"compact.method={request.param}", *METHODS[request.param], *LARGE_STEPS)
    return trained_run(config, overrides, compact)


@pytest.fixture(scope="module")
def weights(trained: Trained) -> dict[str, Tensor]:
    """What the integers of the last step stand for."""
    return {name: module.dequantized() for name, module in integer_modules(trained.model).items()}


def target(seen: Context, layer: int, role: str, name: str) -> Tensor:
    """The kept block of the original weight with the trained adapter."""
    factors = read_factors(seen.reader("train", "adapter").read, name)
    return merged_weight(sliced_base_weight(seen, layer, role, name)[0], *factors, seen.config.train.alpha / 4)


def test_what_was_trained_is_what_is_stored(trained: Trained, weights: dict[str, Tensor]) -> None:
    reader = trained.seen.reader("compact")
    for name, weight in weights.items():
        assert torch.equal(integer_weight(trained.seen, reader, name), weight)
    assert torch.equal(logits(compact_model(trained.seen)), logits(trained.model))
    assert {stage.split()[0] for stage in verify_path(trained.out)} >= {"compact", "recover", "evaluate"}


def test_training_moved_what_the_method_trains(trained: Trained, weights: dict[str, Tensor]) -> None:
    seen, settings, moved = trained.seen, trained.seen.config.compact, []
    first, reader = first_integers(seen), seen.reader("compact")
    for layer, role, name in seen.known.small.linears():
        weight, bits = target(seen, layer, role, name), settings.bits
        if settings.method == "qat-lora":
            weight = sliced_base_weight(seen, layer, role, name)[0]
        codes, scale, _ = first(name, weight)
        assert torch.equal(reader.read(f"{name}.scale"), scale) == (settings.method == "qa-lora")
        if settings.method == "qa-lora":
            offset = reader.read(f"{name}.offset")
            assert torch.equal(grid.dequantize(codes, scale, offset), weights[name])
            moved.append((offset != 0).double().mean().item())
        else:
            start = grid.dequantize(codes, scale, grid.offset_of(settings.first_offset_at(bits), scale))
            moved.append((weights[name] - start).abs().gt(0.5 * scale.mean()).double().mean().item())
    assert min(moved) > (0.99 if settings.method == "qa-lora" else 0.0)


def test_only_l4q_and_qat_lora_leave_an_adapter_and_only_l4q_transfers_it(trained: Trained) -> None:
    seen, beside = trained.seen, trained.seen.config.compact.method == "qat-lora"
    assert bool(list((trained.out / "compact").glob("adapter*"))) == beside
    assert not list((trained.out / "recover").glob("compact_adapter*"))
    assert "unquantise_gap" not in seen.read_json("recover", "recovery.json")


def test_evaluation_and_export_take_the_adapter_along(trained: Trained, weights: dict[str, Tensor]) -> None:
    seen, method = trained.seen, trained.seen.config.compact.method
    rows = {row["model"]: row for row in seen.read_json("evaluate", "metrics.json") if row["dataset"] == "task"}
    sides = [shape_of(role, seen.known.small.layers[layer]) for layer, role, _ in seen.known.small.linears()]
    bits, group = seen.config.compact.bits, seen.config.compact.group_size
    numbers = 32 / group * (2 if method == "qa-lora" else 1)
    factors = 32 * 4 * sum(map(sum, sides)) / sum(map(math.prod, sides)) if method == "qat-lora" else 0
    expected = bits + numbers + factors
    assert rows["compact"]["bits_per_weight"] == pytest.approx(expected, abs=0.02)
    said = seen.read_json("export", "export.json")["small"]["weights"]
    assert ("not one integer model" in said) == (method == "qat-lora")
    assert method in said.lower()
    small = TensorReader(trained.out / "export" / "small")
    for name, weight in weights.items():
        if method == "qat-lora":
            factors = read_factors(seen.reader("compact", "adapter").read, name)
            weight = merged_weight(weight, *factors, seen.config.train.alpha / 4)
        assert torch.equal(small.read(f"{name}.weight"), weight)


def test_without_steps_the_merged_weight_is_rounded_and_nothing_else(config: Path) -> None:
    settings = load(config, ("compact.steps=0", "compact.init=awmse"))
    seen = context_of(settings, compile_model(settings, Reporter(json_lines=True), until="compact"))
    assert seen.read_json("compact", "history.json") == []
    first = first_integers(seen)
    for layer, role, name in seen.known.small.linears():
        codes, scale, _ = first(name, target(seen, layer, role, name))
        assert torch.equal(integer_weight(seen, seen.reader("compact"), name), grid.dequantize(codes, scale, None))


def test_a_cold_start_rounds_the_original_weight(config: Path) -> None:
    still = ("compact.steps=0", "compact.init=mse", "compact.warm_start=false", "compact.method=qa-lora")
    settings = load(config, still)
    seen = context_of(settings, compile_model(settings, Reporter(json_lines=True), until="compact"))
    first = first_integers(seen)
    for layer, role, name in seen.known.small.linears():
        codes, scale, _ = first(name, sliced_base_weight(seen, layer, role, name)[0])
        found = integer_weight(seen, seen.reader("compact"), name)
        assert torch.equal(found, grid.dequantize(codes, scale, torch.zeros_like(scale)))


def test_memory_is_planned_by_what_is_trained(config: Path) -> None:
    known, peaks = know(load(config, ())), {}
    for method in ("l4q", *METHODS):
        plan = make_plan(load(config, (f"compact.method={method}",)))
        peaks[method] = next(stage for stage in plan.stages if stage.name == "compact").host_peak
    weights = known.small.linear_weights()
    # LSQ: three more copies of every weight; no factors, with their copies and what a batch keeps for them.
    factors = 4 * layouts.tensor_bytes(known.compact_adapter()) + ALLOCATOR * 4 * (2 * 64) * 7 * 4 * 2
    assert peaks["lsq"] - peaks["l4q"] == pytest.approx(3 * 4 * weights - factors, abs=1)
    assert peaks["qa-lora"] < peaks["l4q"] == peaks["qat-lora"] < peaks["lsq"]


def test_methods_and_grids_that_cannot_be_are_refused(config: Path) -> None:
    for offset in ("zero", "half"):
        with pytest.raises(ConfigError, match=f"qa-lora trains offsets, which offset: {offset} leaves no room for"):
            load(config, ("compact.method=qa-lora", f"compact.offset={offset}"))
    for method, why in (("lsq", "trains the weight"), ("qa-lora", "holds its codes packed")):
        with pytest.raises(ConfigError, match=f"{method} {why}.*set it to dense"):
            load(config, (f"compact.method={method}", "compact.base=int8"))
    with pytest.raises(ConfigError, match=r"compact\.method"):
        load(config, ("compact.method=dora",))

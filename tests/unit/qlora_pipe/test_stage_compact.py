"""The integer model: bits and offsets of each matrix from the settings to the exported weights, and where it starts."""

from pathlib import Path

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import Tensor

from prune.groups import PRUNED_AXIS, shape_of
from qlora_pipe.architectures import SITE, covariance_name
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.plan import know, make_plan
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import integer_weight, sliced_base_weight
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.verify import verify_path
from quant import grid
from quant.moments import unpack_triangle
from quant.pack import unpack
from quant.rounding import feedback
from quant.start import first_codes
from quant.storage import packed_columns

DOWN, Q = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
STILL = ("compact.steps=1", "compact.learning_rate=1e-12", "compact.step_rate=1e-12", "compact.warmup=0")
MIXED = ("compact.bits=2", "compact.rules=[{roles: [down, o], bits: 4}, {layers: [-1], roles: [down], bits: 8}]")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compact")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


def made(config: Path, *overrides: str, until: str = "compact") -> tuple[Context, dict[str, Artifact]]:
    settings = load(config, overrides)
    artifacts = compile_model(settings, Reporter(json_lines=True), until=until)
    return context_of(settings, artifacts), artifacts


def target(seen: Context, layer: int, role: str, name: str) -> Tensor:
    """What is quantised at step 0: the kept block of the original weight, and the trained adapter."""
    lora_a, lora_b = read_factors(seen.reader("train", "adapter").read, name)
    strength = seen.config.train.alpha / seen.config.train.rank
    return torch.addmm(sliced_base_weight(seen, layer, role, name)[0], lora_b, lora_a, alpha=strength)


def squares(seen: Context, layer: int, role: str, name: str) -> Tensor:
    found = seen.reader("calibrate", "moments").read(f"{name}.input")
    return found[seen.index_map.kept_indices(layer, role)] if PRUNED_AXIS[role] == "columns" else found


def test_every_matrix_has_its_bits_and_starts_at_its_own_grid(config: Path) -> None:
    seen, artifacts = made(config, *STILL, *MIXED, "compact.init=awmse")
    reader = seen.reader("compact")
    found = set()
    for layer, role, name in seen.known.small.linears():
        bits = {"down": 8 if layer == 1 else 4, "o": 4}.get(role, 2)
        found.add(bits)
        weight, kind = target(seen, layer, role, name), "half" if bits == 2 else "zero"
        importance = squares(seen, layer, role, name)
        assert importance.shape == weight.shape[1:]
        step, _ = grid.init_grid(weight, bits, 32, method="awmse", offset=kind, importance=importance)
        assert reader.locations[f"{name}.codes"].spec.shape == (len(weight), packed_columns(weight.shape[1], bits))
        torch.testing.assert_close(reader.read(f"{name}.scale"), step, rtol=1e-6, atol=1e-9)
        at = grid.half_step(step) if kind == "half" else None
        expected = grid.dequantize(grid.quantize(weight, step, at, bits)[0], step, at)
        torch.testing.assert_close(integer_weight(seen, reader, name), expected, rtol=1e-5, atol=1e-8)
    assert found == {2, 4, 8}
    assert len(list(verify_path(artifacts["compact"].folder))) == 1


@pytest.mark.parametrize("base", ["dense", "int8"])
def test_training_starts_at_compensated_codes_of_what_pruning_and_training_left(config: Path, base: str) -> None:
    seen, _ = made(config, *STILL, *MIXED, "compact.init=feedback", f"compact.base={base}")
    reader, moved = seen.reader("compact"), 0.0
    for layer, role, name in seen.known.small.linears():
        weight, bits = target(seen, layer, role, name), seen.known.integer_bits[name]
        covariance = unpack_triangle(seen.reader("calibrate", "moments").read(covariance_name(layer, SITE[role])))
        if PRUNED_AXIS[role] == "columns":
            kept = seen.index_map.kept_indices(layer, role)
            covariance = covariance[kept][:, kept]
        kind, passing = "half" if bits == 2 else "zero", feedback(covariance, 32, seen.config.decompose.damping)
        codes, scale, _ = first_codes(weight, bits, 32, method="feedback", offset=kind, passing=passing)
        found = grid.to_signed(unpack(reader.read(f"{name}.codes"), bits, weight.shape[1]), bits)
        assert (found == codes).double().mean() > 0.999
        torch.testing.assert_close(reader.read(f"{name}.scale"), scale, rtol=1e-6, atol=1e-9)
        at = grid.half_step(scale) if kind == "half" else None
        moved += (grid.quantize(weight, scale, at, bits)[0] != codes).double().mean().item()
    assert moved > 0.5


def test_a_trained_offset_is_stored_and_exported(config: Path) -> None:
    settings = ("compact.offset=trained", "compact.init=asymmetric", "compact.bits=3", "compact.step_rate=1e-3")
    seen, artifacts = made(config, *settings, until="export")
    reader = seen.reader("compact")
    codes = unpack(reader.read(f"{DOWN}.codes"), 3, 128).float() - 4
    scale, offset = (reader.read(f"{DOWN}.{kind}") for kind in ("scale", "offset"))
    assert offset.abs().max() > 0.01
    expected = codes * scale.repeat_interleave(32, dim=1) + offset.repeat_interleave(32, dim=1)
    written = TensorReader(artifacts["export"].folder / "small").read(f"{DOWN}.weight")
    assert torch.equal(written, expected)
    still = made(config, *settings, *STILL, "compact.step_rate=1e-12")[0].reader("compact").read(f"{DOWN}.offset")
    assert (offset - still).abs().max() > 1e-4


def test_planned_bytes_are_those_of_the_bits(config: Path) -> None:
    few, many = (make_plan(load(config, given)) for given in (("compact.bits=2",), ("compact.bits=4",)))
    mixed = make_plan(load(config, MIXED))
    sizes = [
        sum(next(stage for stage in plan.stages if stage.name == "compact").files.values())
        for plan in (few, mixed, many)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_packed_base_is_planned_smaller(config: Path) -> None:
    bases = ("compact.base=dense",), ("compact.base=int8",), ("compact.base=int4", "compact.bits=2")
    plans = [make_plan(load(config, given)) for given in bases]
    peaks = [next(stage for stage in plan.stages if stage.name == "compact").host_peak for plan in plans]
    assert peaks[0] > peaks[1] > peaks[2]
    known = know(load(config, ()))
    weights = known.small.linear_weights()
    # 3 bytes fewer a weight, scales of 4 bytes for 32 of them, levels, and the factors of the warm start once more.
    factors = sum(4 * 4 * sum(shape_of(role, known.small.layers[layer])) for layer, role, _ in known.small.linears())
    assert peaks[0] - peaks[1] == 3 * weights - weights // 8 - 4 * 256 * 14 - factors


def test_rules_and_grids_that_cannot_be_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"compact\.rules\.0 .* there is no layer 7"):
        make_plan(load(config, ("compact.rules=[{layers: [7], bits: 2}]",)))
    with pytest.raises(ConfigError, match=r"compact\.rules\.0\.bits"):
        load(config, ("compact.rules=[{layers: [0], bits: 5}]",))
    with pytest.raises(ConfigError, match="init: asymmetric is for trained offsets"):
        load(config, ("compact.init=asymmetric",))
    with pytest.raises(ConfigError, match="base: int8 needs levels that are tied"):
        load(config, ("compact.base=int8", "compact.offset=trained"))
    with pytest.raises(ConfigError, match="init: feedback needs levels that are tied"):
        load(config, ("compact.init=feedback", "compact.offset=trained"))
    with pytest.raises(ConfigError, match="int4 has too few places in the cells of a grid of 3 bits"):
        load(config, ("compact.base=int4", "compact.bits=2", "compact.rules=[{roles: [q], bits: 3}]"))
    with pytest.raises(ConfigError, match=r"compact\.init: feedback needs covariances"):
        load(config, ("compact.init=feedback", "calibrate.covariance=false", "decompose.metric=fisher"))
    without = load(config, ("calibrate.covariance=false", "decompose.metric=fisher"))
    assert [without.compact_init(bits) for bits in (2, 4)] == ["awmse", "awmse"]
    assert [load(config, ()).compact_init(bits) for bits in (2, 3, 4)] == ["feedback", "feedback", "awmse"]

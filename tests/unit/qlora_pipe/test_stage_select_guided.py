"""LoRAPrune's loop: what it masks, that the small model is the masked one, and that it can be killed and goes on."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.test_chain import FAMILIES
from tiny import context_of, save_settings, save_texts, save_tiny_model

from prune.groups import group_width
from prune.indexmap import IndexMap
from prune.scatter import restrict_adapter
from qlora_pipe.architectures import linear_name
from qlora_pipe.artifacts.manifest import file_digest
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.ramp import Ramp
from qlora_pipe.known import CHAIN
from qlora_pipe.stages.models import full_packed_model, packed_modules, pruned_model
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.verify import verify_path

NAME = linear_name(0, "down")
GUIDED = (
    "prune.method=lora",
    "prune.kv_ratio=0.5",
    "prune.ffn_ratio=0.5",
    "guide.steps=20",
    "guide.interval=2",
    "guide.length=32",
    "guide.batch_size=2",
    "guide.learning_rate=0.01",
    "guide.save_steps=5",
    "align.rank=3",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module")
def artifacts(config: Path) -> dict[str, Artifact]:
    return compile_model(load(config, GUIDED), Reporter(json_lines=True))


@pytest.fixture(scope="module")
def shrunk(config: Path) -> dict[str, Artifact]:
    """The same where what is masked leaves the computation."""
    settings = (*GUIDED, "guide.shrink=true", f"run={config.parent / 'shrunk'}")
    return compile_model(load(config, settings), Reporter(json_lines=True), until="align")


def index_map(artifacts: dict[str, Artifact]) -> IndexMap:
    return IndexMap.from_json(json.loads((artifacts["select"].folder / "kept.json").read_text()))


def test_as_many_groups_stay_as_were_asked_for(artifacts: dict[str, Artifact]) -> None:
    for kept in index_map(artifacts).layers:
        assert (len(kept.kv_heads), len(kept.ffn)) == (1, 96)
    for stage in ("select", "prune", "align"):
        list(verify_path(artifacts[stage].folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_model_is_the_small_one(family: str, tmp_path: Path) -> None:
    """Whatever the groups, biases and norms of the family are. 1e-4: fp32 sums in another order."""
    save_tiny_model(tmp_path / "model", family.partition("-")[0], **FAMILIES[family])
    save_texts(tmp_path)
    settings = load(save_settings(tmp_path), ("prune.method=random",))
    seen = context_of(settings, compile_model(settings, Reporter(json_lines=True), until="prune"))
    model, shapes = full_packed_model(seen), seen.known.architecture.layers
    ids = torch.arange(2, 34).view(2, 16)
    whole = model(input_ids=ids).logits
    found = pruned_model(seen)(input_ids=ids).logits
    assert not torch.allclose(whole, found, atol=1e-2)
    for shrink in (False, True):
        model = full_packed_model(seen)
        guide = seen.config.guide.model_copy(update={"shrink": shrink})
        ramp = Ramp(packed_modules(model), shapes, guide, [(1, 96)] * len(shapes))
        for mask, layer in zip(ramp.masks.values(), seen.index_map.layers, strict=True):
            for kind, indices in (("kv", layer.kv_heads), ("ffn", layer.ffn)):
                mask[kind].zero_()[list(indices)] = 1
        ramp.load(ramp.state())
        torch.testing.assert_close(model(input_ids=ids).logits, found, rtol=1e-4, atol=1e-4)


def test_slot_c_goes_on_from_what_was_trained(config: Path, artifacts: dict[str, Artifact]) -> None:
    """Without an alignment of its own it is cut and left as it is; with one it starts from there."""
    seen = context_of(load(config, GUIDED), artifacts)
    full, small = (TensorReader(artifacts[stage].folder, "adapter") for stage in ("select", "align"))
    going_on = load(config, (*GUIDED, "align.enabled=true", "align.steps=1", "align.learning_rate=1e-9"))
    after = compile_model(going_on, Reporter(json_lines=True), until="align")
    for layer, role, name in seen.known.architecture.linears():
        expected = restrict_adapter(*read_factors(full.read, name), role, seen.index_map.kept_indices(layer, role))
        for stage in (small, TensorReader(after["align"].folder, "adapter")):
            for found, wanted in zip(read_factors(stage.read, name), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert expected[1].abs().max() > 1e-3


@pytest.mark.parametrize(("sides", "still"), [("matched", "lora_A"), ("published", "lora_B")])
def test_columns_are_seen_from_their_side_unless_told_otherwise(config: Path, sides: str, still: str) -> None:
    """A step that moves nothing leaves the start: which factor of o and down is zero."""
    settings = (*GUIDED, f"guide.sides={sides}", "guide.learning_rate=1e-12", f"run={config.parent / sides}")
    made = compile_model(load(config, settings), Reporter(json_lines=True), until="select")
    reader = TensorReader(made["select"].folder, "adapter")
    assert reader.read(f"{linear_name(0, 'down')}.{still}.weight").abs().max() < 1e-9
    assert reader.read(f"{linear_name(0, 'up')}.lora_B.weight").abs().max() < 1e-9
    assert reader.read(f"{linear_name(0, 'up')}.lora_A.weight").abs().max() > 1e-2


def test_a_cut_of_another_adapter_is_found(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    compile_model(load(config, (*GUIDED, f"run={run}")), Reporter(json_lines=True), until="align")
    assert len(list(verify_path(run))) == CHAIN.index("align") + 1
    path = (run / "align").resolve() / "adapter.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : (start := 8 + int.from_bytes(content[:8], "little"))])
    first, end = (start + offset for offset in header[f"{NAME}.lora_A.weight"]["data_offsets"])
    content[first:end] = content[first + 4 : end] + content[first : first + 4]
    path.write_bytes(content)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = file_digest(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="is not select's adapter at the kept indices"):
        list(verify_path(run))


def test_a_live_group_without_score_is_not_taken_for_a_masked_one(config: Path, artifacts: dict[str, Artifact]) -> None:
    seen = context_of(load(config, GUIDED), artifacts)
    modules, shapes = packed_modules(full_packed_model(seen)), seen.known.architecture.layers
    ramp = Ramp(modules, shapes, seen.config.guide, [(1, 96)] * len(shapes))
    scores = [{"kv": torch.tensor([0.0, 2.0]), "ffn": torch.arange(192.0)} for _ in shapes]
    for layer in scores:
        layer["ffn"][100:] = 0
    ramp._average.update(scores)
    for mask in ramp.masks.values():
        mask["ffn"][:10] = 0
    ramp._renew(0.5)
    for mask in ramp.masks.values():
        assert not mask["ffn"][:10].any()
        assert int(mask["ffn"].sum()) == 144


class Killed(Exception):
    pass


@pytest.mark.parametrize(("at", "calm"), [(7, "artifacts"), (13, "artifacts"), (13, "shrunk")])
def test_killed_on_the_ramp_it_ends_in_the_same_bytes(
    config: Path, at: int, calm: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[str, Artifact] = request.getfixturevalue(calm)
    run = f"run={config.parent / f'killed-{at}-{calm}'}"
    settings = load(config, (*GUIDED, f"guide.shrink={str(calm == 'shrunk').lower()}", run))
    real = Ramp.before_step

    def until(self: Any, step: int) -> None:
        if step == at:
            raise Killed
        real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Ramp, "before_step", until)
        with pytest.raises(Killed):
            compile_model(settings, Reporter(json_lines=True), until="select")
    steps = []

    def counted(self: Any, step: int) -> None:
        steps.append(step)
        real(self, step)

    monkeypatch.setattr(Ramp, "before_step", counted)
    again = compile_model(settings, Reporter(json_lines=True), until="select")
    assert steps == list(range(at // 5 * 5, 20))
    assert again["select"].manifest.files == expected["select"].manifest.files


def test_the_ramp_masks_more_and_more_and_nothing_comes_back(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[torch.Tensor]] = []
    real = Ramp.before_step

    def watched(self: Any, step: int) -> None:
        real(self, step)
        seen.append([mask["ffn"].clone() for mask in self.masks.values()])

    monkeypatch.setattr(Ramp, "before_step", watched)
    settings = load(config, (*GUIDED, f"run={config.parent / 'watched'}"))
    compile_model(settings, Reporter(json_lines=True), until="select")
    left = [int(masks[0].sum()) for masks in seen]
    # Warm-up to step 2, new masks at even steps, the last at 18.
    assert left[:4] == [192] * 4
    assert left[18:] == [96, 96]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 5
    for before, after in itertools.pairwise(seen):
        assert all(bool((new <= old).all()) for old, new in zip(before, after, strict=True))


def test_masked_groups_get_no_gradient(config: Path, artifacts: dict[str, Artifact]) -> None:
    seen = context_of(load(config, GUIDED), artifacts)
    model = full_packed_model(seen)
    modules, shapes = packed_modules(model), seen.known.architecture.layers
    generator = torch.Generator().manual_seed(0)
    for module in modules.values():
        module.attach_adapter(3, 6, generator)
    ramp = Ramp(modules, shapes, seen.config.guide, [(1, 96)] * len(shapes))
    ramp.masks[0]["kv"][1] = 0
    ramp.masks[0]["ffn"][5:] = 0
    model(input_ids=torch.arange(2, 34).view(2, 16)).logits.square().sum().backward()
    for role, first in (("q", 1), ("k", 1), ("v", 1), ("gate", 5), ("up", 5)):
        gradient = modules[linear_name(0, role)].task_b.grad
        width = group_width(role, shapes[0])
        assert gradient[: first * width].abs().max() > 0
        assert not gradient[first * width :].any()


def test_what_is_masked_may_leave_the_computation(
    config: Path, artifacts: dict[str, Artifact], shrunk: dict[str, Artifact]
) -> None:
    """The same groups go and the same adapter is learnt: 1e-4 of its largest value, fp32 sums in another order."""
    assert index_map(shrunk) == index_map(artifacts)
    expected, found = (TensorReader(made["align"].folder, "adapter") for made in (artifacts, shrunk))
    for _, _, name in context_of(load(config, GUIDED), artifacts).known.architecture.linears():
        for one, other in zip(read_factors(expected.read, name), read_factors(found.read, name), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=1e-4 * float(one.abs().max()))


def test_narrow_maps_compute_less(config: Path, artifacts: dict[str, Artifact]) -> None:
    seen = context_of(load(config, GUIDED), artifacts)
    model = full_packed_model(seen)
    modules, shapes = packed_modules(model), seen.known.architecture.layers
    guide = seen.config.guide.model_copy(update={"shrink": True})
    ramp = Ramp(modules, shapes, guide, [(1, 96)] * len(shapes))
    ramp.masks[0]["ffn"][5:] = 0
    ramp.load(ramp.state())
    widths = {}
    for role in ("q", "up", "down"):
        modules[linear_name(0, role)].register_forward_hook(
            lambda module, inputs, output, role=role: widths.update({role: (inputs[0].shape[-1], output.shape[-1])})
        )
    model(input_ids=torch.arange(2, 34).view(2, 16))
    assert widths == {"q": (64, 64), "up": (64, 5), "down": (5, 64)}


def test_widths_that_must_be_known_before_are_not_allocated(config: Path) -> None:
    with pytest.raises(ConfigError, match="lora masks groups to widths it knows before"):
        load(config, (*GUIDED, "prune.widths=allocated", "prune.ratio=0.2", "export.small=false"))

"""Single entries through the chain: masks, zeros in the folder of prune, what is recovered, and what verify sees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.test_chain import Recorder
from tiny import context_of, save_settings, save_texts, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune.indexmap import IndexMap
from prune.sparse import check_mask, unpack_mask, wanda_mask
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ArtifactError, ConfigError, StageError
from qlora_pipe.inspection import describe
from qlora_pipe.known import CHAIN
from qlora_pipe.report import write_report
from qlora_pipe.stages import sparse
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import packed_map, pruned_model
from qlora_pipe.verify import verify_path
from quant.linear import PackedLinear

IDS = torch.arange(40)[None] + 30
DOWN1 = "model.layers.1.mlp.down_proj"
WHOLE = ("prune.kv_ratio=0", "prune.ffn_ratio=0", "prune.align=64", "compact.enabled=false")
CASES = {
    "unstructured": ("unstructured", "sparsegpt"),
    "unstructured-wanda": ("unstructured", "wanda"),
    "2:4": ("2:4", "sparsegpt"),
    "2:4-wanda": ("2:4", "wanda"),
    "4:8": ("4:8", "sparsegpt"),
    "4:8-wanda": ("4:8", "wanda"),
}


def overrides(case: str) -> tuple[str, ...]:
    pattern, by = CASES[case]
    return (*WHOLE, f"prune.sparsity.pattern={pattern}", f"prune.sparsity.by={by}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to refine; patterns go on from there."""
    place = tmp_path_factory.mktemp("sparse")
    save_tiny_model(place / "model")
    save_texts(place)
    compile_model(load(save_settings(place), WHOLE), Recorder(), until="refine")
    return place


def context(folder: Path, case: str, *more: str, until: str = "prune") -> Context:
    """What is known after a verified run up to there."""
    config = load(folder / "tiny.yaml", (*overrides(case), *more))
    found = context_of(config, compile_model(config, Recorder(), until=until))
    assert [line.split()[0] for line in verify_path(Path(str(config.run)))][-1] == until
    return found


def maps(context: Context) -> list[tuple[str, Tensor, PackedLinear, PackedLinear]]:
    """(name, mask, full map, sparse map) of every linear map."""
    masks, found = context.reader("select", "masks"), []
    for layer, role, name in context.known.architecture.linears():
        full, small = (packed_map(context, context.reader(it), it, layer, role) for it in ("decompose", "prune"))
        found.append((name, unpack_mask(masks.read(f"{name}.mask"), full.shape.in_features), full, small))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_pattern_is_kept_and_all_but_the_codes_stays(folder: Path, case: str) -> None:
    seen, (pattern, by) = context(folder, case), CASES[case]
    ratio, group = {"unstructured": (0.55, None), "2:4": (0.5, 4), "4:8": (0.5, 8)}[pattern]
    body = json.loads((folder / "run/select/selection.json").read_text())
    gone = 0
    for name, mask, full, small in maps(seen):
        check_mask(mask, ratio, group)
        assert not small.dequantized(include_lowrank=False)[mask].any()
        before, after = full.state_dict(), small.state_dict()
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == ["codes"]
        assert body["matrices"][name]["zeros"] == int(mask.sum())
        gone += int(mask.sum())
        if by == "wanda":
            rest = seen.base_reader.read_float(f"{name}.weight") - (
                full.dequantized() - full.dequantized(include_lowrank=False)
            )
            inputs = seen.reader("calibrate", "moments").read(f"{name}.input").sqrt()
            # The low-rank part is summed in another order there.
            assert (wanda_mask(rest, inputs, ratio, group) != mask).float().mean() < 0.01
    assert body["parameters"]["model"] - body["parameters"]["nonzero"] == gone
    assert body["true_sparsity"] == pytest.approx(ratio, abs=1e-4)
    kept = IndexMap.from_json(json.loads((folder / "run/select/kept.json").read_text()))
    assert kept == IndexMap.identity(seen.known.architecture.layers)


def test_stock_transformers_loads_the_sparse_model(folder: Path) -> None:
    seen = context(folder, "4:8")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder / "run/prune")(IDS).logits
        expected = pruned_model(seen, dense=False)(IDS).logits
        before = AutoModelForCausalLM.from_pretrained(folder / "run/decompose")(IDS).logits
    assert torch.equal(found, expected)
    assert (found - before).abs().max() > 0.1
    settings = [json.loads((folder / "run" / stage / "config.json").read_text()) for stage in ("prune", "decompose")]
    assert settings[0]["quantization_config"] == settings[1]["quantization_config"]


def test_zeros_that_others_make_up_for_lose_less(folder: Path) -> None:
    """Than codes set to zero where they stand: under the covariance of what the maps read."""
    seen, losses = context(folder, "2:4"), [0.0, 0.0]
    for layer, role, name in seen.known.architecture.linears():
        covariance = sparse.Moments(seen).covariance(layer, role).double()
        mask = unpack_mask(seen.reader("select", "masks").read(f"{name}.mask"), covariance.shape[0])
        weight = seen.base_reader.read_float(f"{name}.weight")
        full, small = (packed_map(seen, seen.reader(it), it, layer, role) for it in ("decompose", "prune"))
        dropped = full.dequantized() - full.dequantized(include_lowrank=False) * mask
        for index, found in enumerate((small.dequantized(), dropped)):
            error = (weight - found).double()
            losses[index] += float((error @ covariance * error).sum())
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize(
    ("case", "more"),
    [
        ("unstructured", ("align.enabled=true", "align.steps=2", "align.rank=2", "align.length=64")),
        ("4:8", ("prune.preset=loram", "recover.base=decomposed")),
    ],
)
def test_the_whole_chain(folder: Path, tmp_path: Path, case: str, more: tuple[str, ...]) -> None:
    """What was trained is what is recovered, to the bit, on every entry; the second run gives the same bytes."""
    run, other = copied(folder, tmp_path), tmp_path / "other"
    context(folder, case, *more, f"run={run}", until="evaluate")
    assert len(list(verify_path(run))) == len(CHAIN)
    trained, recovered = TensorReader(run / "train", "adapter"), TensorReader(run / "recover", "adapter")
    assert trained.locations.keys() == recovered.locations.keys()
    for name in trained.locations:
        assert torch.equal(trained.read(name), recovered.read(name))
    assert any(trained.read(name).any() for name in trained.locations if "lora_B" in name)
    for stage in json.loads((run / "plan.json").read_text())["stages"]:
        files = read_manifest(run / stage["name"]).files
        assert stage["files"] == {name: entry.bytes for name, entry in files.items() if ".safetensors" in name}
    compile_model(load(folder / "tiny.yaml", (*overrides(case), *more, f"run={other}")), Recorder(), until="recover")
    for stage in CHAIN[: CHAIN.index("recover") + 1]:
        assert read_manifest(other / stage).files == read_manifest(run / stage).files


def test_integer_grids_and_nearest_rounding_go_through(folder: Path, tmp_path: Path) -> None:
    """Zero points are codes of their own; and later columns make up for zeros however decompose rounds."""
    more = ("decompose.grids=[uint]", "decompose.metric=fisher", f"run={tmp_path / 'run'}", "refine.steps=2")
    seen = context(folder, "2:4", *more, "refine.enabled=true", "refine.length=32")
    for _, mask, _, small in maps(seen):
        assert not small.dequantized(include_lowrank=False)[mask].any()


def test_superblocks_across_rows_stay(folder: Path, tmp_path: Path) -> None:
    more = ("decompose.superblocks=[4]", f"run={tmp_path / 'run'}")
    seen = context(folder, "unstructured", *more)
    assert all("scale_max" in small.state_dict() for _, _, _, small in maps(seen))


def test_people_are_told(folder: Path) -> None:
    context(folder, "2:4-wanda")
    text = describe(folder / "run/select")
    assert "2:4, by wanda" in text
    assert "50.00 % of the blocks' linear maps, every matrix alike" in text
    assert "KV groups kept" not in text
    assert "model.layers.*.mlp.down_proj.mask" in text
    write_report(folder / "run")
    page = (folder / "run/report.html").read_text()
    assert "Every layer keeps its shape, and single entries are zero. Pattern: 2:4, by wanda." in page


def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def spoiled(folder: Path, tmp_path: Path, case: str, start: str) -> Path:
    """The run made anew from `start` on, while something in it is wrong."""
    run = copied(folder, tmp_path)
    config = load(folder / "tiny.yaml", (*overrides(case), f"run={run}"))
    compile_model(config, Recorder(), until="prune", start=start)
    return run


def test_verify_sees_a_masked_entry_that_is_not_zero(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context(folder, "2:4")
    unpack = sparse.unpack_mask

    def short(packed: Tensor, columns: int) -> Tensor:
        mask = unpack(packed, columns)
        return mask & (torch.arange(columns) > 3)

    monkeypatch.setattr(sparse, "unpack_mask", short)
    run = spoiled(folder, tmp_path, "2:4", "prune")
    with pytest.raises(
        ArtifactError, match=r"q_proj\.codes: expected zeros at the 2048 masked entries, found \d+ others"
    ):
        list(verify_path(run))
    # Only the run knows the masks.
    assert len(list(verify_path(run / "prune"))) == 1


def test_verify_sees_scales_that_are_not_the_full_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context(folder, "2:4")
    masked = sparse.masked_buffers

    def louder(*given: Any) -> dict[str, Tensor]:
        found = masked(*given)
        return found | {"scale_offset": found["scale_offset"] * 2}

    monkeypatch.setattr(sparse, "masked_buffers", louder)
    run = spoiled(folder, tmp_path, "2:4", "prune")
    with pytest.raises(ArtifactError, match=r"q_proj\.scale_offset is not that of decompose"):
        list(verify_path(run))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: mask.roll(1, 1), r"expected 2 of every 4 inputs to go"),
        (lambda mask: mask & (torch.arange(mask.shape[1]) > 3), r"entries to go, found"),
    ],
)
def test_verify_sees_a_mask_that_is_not_of_the_pattern(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], message: str
) -> None:
    context(folder, "2:4")
    choose = sparse.sparsegpt_mask
    monkeypatch.setattr(sparse, "sparsegpt_mask", lambda *given: change(choose(*given)))
    run = spoiled(folder, tmp_path, "2:4", "select")
    with pytest.raises(ArtifactError, match=message):
        list(verify_path(run / "select"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body["matrices"][DOWN1].update(zeros=5), rf"{DOWN1}: its mask has .*, found .*'zeros': 5"),
        (lambda body: body["parameters"].update(nonzero=5), r"masks leave \d+ parameters"),
        (
            lambda body: body.update(true_sparsity=0.6),
            r"masks leave \d+ parameters, a share of 0\.5 goes, found others",
        ),
        (lambda body: body["sparsity"].update(pattern="4:9"), "expected a whole artifact, found"),
        (lambda body: body.pop("matrices"), "expected a whole artifact, found KeyError"),
    ],
)
def test_verify_sees_statements_that_do_not_follow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: Callable[[Any], Any], message: str
) -> None:
    context(folder, "2:4")
    record = sparse.record

    def wrong(*given: Any) -> dict[str, Any]:
        body = record(*given)
        edit(body)
        body.setdefault("true_sparsity", 0.5)
        return body

    monkeypatch.setattr(sparse, "record", wrong)
    run = spoiled(folder, tmp_path, "2:4", "select")
    with pytest.raises(ArtifactError, match=message):
        list(verify_path(run / "select"))


def test_what_cannot_be_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for more, message in (
        (("compact.enabled=true",), r"set compact\.enabled to false"),
        (("calibrate.covariance=false",), r"set calibrate\.covariance to true"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder / "tiny.yaml", (*overrides("2:4"), *more))
    with pytest.raises(ConfigError, match="about whole groups are align: leave them out"):
        load(folder / "tiny.yaml", (*overrides("2:4"), "prune.align=32"))
    read = TensorReader.read

    def opposite(self: TensorReader, name: str) -> Tensor:
        found = read(self, name)
        return -found if name.endswith(".covariance") else found

    context(folder, "2:4")
    run = copied(folder, tmp_path)
    monkeypatch.setattr(TensorReader, "read", opposite)
    with pytest.raises(StageError, match=r"select: model\.layers\.0\.self_attn\.q_proj: .*calibrate on more tokens"):
        compile_model(load(folder / "tiny.yaml", (*overrides("2:4"), f"run={run}")), Recorder(), start="select")

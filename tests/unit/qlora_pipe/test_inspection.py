import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.artifacts.layout import TensorSpec
from qlora_pipe.artifacts.manifest import FileEntry, Manifest, read_manifest
from qlora_pipe.errors import ArtifactError
from qlora_pipe.inspection import describe, fold, weight_sets
from qlora_pipe.known import CHAIN
from qlora_pipe.report.facts import configuration_name
from quant.storage import Choice

ROOT = Path(__file__).parents[3]
Build = Callable[..., Any]


def row(text: str, start: str) -> list[str]:
    """Cells of the first line that begins with `start`, blanks within cells aside."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_run(run_builder: Build) -> None:
    run = run_builder().build()
    text = describe(run)
    for stage in CHAIN:
        assert row(text, stage)[:2] == [stage, read_manifest(run / stage).identity[:12]]
    assert f"{len(CHAIN)} of {len(CHAIN)} stages" in text
    assert row(text, "train.rank") == ["train.rank", "4", "16"]
    assert row(text, "decompose.ranks") == ["decompose.ranks", "4", "0, 16, 32, 64"]
    assert row(text, "model ") == ["model", "package:tiny", "-"]
    assert row(text, "data.evaluation.c4.source") == ["data.evaluation.c4.source", "c4.txt", "-"]
    settings = text[text.index("settings that differ") :]
    for same in ("train.alpha", "seed", "run ", "decompose.budget", "data.task.heldout"):
        assert f"\n{same}" not in settings


def test_a_run_that_was_cut_short(run_builder: Build) -> None:
    run = run_builder().build("score")
    (run / "config.yaml").unlink()
    text = describe(run)
    assert f"3 of {len(CHAIN)} stages" in text
    assert "settings" not in text


def test_an_artifact(run_builder: Build) -> None:
    run = run_builder().build("train")
    manifest, text = read_manifest(run / "train"), describe(run / "train")
    assert row(text, "identity") == ["identity", manifest.identity]
    assert row(text, "from prune") == ["from prune", manifest.inputs["prune"]]
    assert row(text, "setting seed") == ["setting seed", "0"]
    entry = manifest.files["adapter.safetensors"]
    assert row(text, "adapter.safetensors")[2] == entry.sha256[:12]
    folded = row(text, "model.layers.*.mlp.down_proj.lora_A.weight")
    assert folded[1:] == ["F32", "4 x 64", "3", "3.07 KB"]
    assert text.count("lora_A") == 7


def test_select_tells_what_each_layer_keeps(run_builder: Build) -> None:
    text = describe(run_builder().build("select") / "select")
    assert row(text, "true reduction")[1] == "33.22 % of the blocks' parameters"
    assert row(text, "nominal")[1] == "0.0 % of the KV groups, 50.0 % of the FFN channels"
    lines = text[text.index("KV groups kept") :].splitlines()[2:]
    assert [line.split() for line in lines] == [[str(layer), "2", "of", "2", "64", "of", "128"] for layer in range(3)]


def test_allocate_tells_how_often_each_width_was_taken(run_builder: Build) -> None:
    builder = run_builder()
    text = describe(builder.build("allocate") / "allocate")
    choices = list(builder.known.allocation.values())
    for bits in {choice.bits for choice in choices}:
        count = sum(choice.bits == bits for choice in choices)
        assert row(text, f"{bits} bits ") == [f"{bits} bits", "#" * round(40 * count / 21), str(count)]
    count = sum((choice.bits, choice.block_size) == (3, 32) for choice in choices)
    assert row(text, "3 bits, blocks of 32, rank 4")[1] == str(count)


def test_weights_in_folders_of_an_artifact(run_builder: Build) -> None:
    text = describe(run_builder().build() / "export")
    for name in ("tensor in peft/adapter_model", "tensor in merged/model", "tensor in small/model"):
        assert name in text
    assert row(text, "base_model.model.model.layers.*.mlp.up_proj.lora_B.weight")[2:4] == ["128 x 4", "3"]


def test_tensors_fold_by_layer_and_split_by_shape() -> None:
    specs = {f"model.layers.{layer}.mlp.up_proj.codes": TensorSpec("I32", (8, 2)) for layer in range(12)}
    specs["model.layers.5.mlp.up_proj.codes"] = TensorSpec("I32", (8, 3))
    specs |= {"model.norm.weight": TensorSpec("F32", (4,)), "model.offset": TensorSpec("F32", ())}
    assert fold(specs) == [
        ("model.layers.*.mlp.up_proj.codes", "I32", "8 x 2", "11", "704 B"),
        ("model.layers.*.mlp.up_proj.codes", "I32", "8 x 3", "1", "96 B"),
        ("model.norm.weight", "F32", "4", "1", "16 B"),
        ("model.offset", "F32", "", "1", "4 B"),
    ]


def test_sharded_weights_are_one_set() -> None:
    names = [f"small/model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    names += ["small/model.safetensors.index.json", "adapter.safetensors", "history.json"]
    files = {name: FileEntry("0", 1) for name in names}
    assert list(weight_sets(Manifest("x", "0", 1, {}, {}, files, {}))) == [("", "adapter"), ("small/", "model")]


def test_typed_errors(run_builder: Build, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a run folder or an artifact, found neither"):
        describe(tmp_path)
    run = run_builder().build("calibrate")
    (run / "config.yaml").write_text("modle: x\n")
    with pytest.raises(ArtifactError, match="modle"):
        describe(run)


def test_torch_is_not_needed(run_builder: Build) -> None:
    run = run_builder().build("select")
    script = (
        "import sys; from pathlib import Path; from qlora_pipe.inspection import describe\n"
        f"for path in {[str(run), str(run / 'select')]!r}: describe(Path(path))\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_configurations_tell_what_is_not_usual() -> None:
    told = {
        Choice("nf", 3, 64, 0): "3 bits, blocks of 64, rank 0",
        Choice("uint", 4, 128, 16, 16, "float16"): "4 bits, blocks of 128, rank 16, integers with zero points, "
        "float16 scales",
        Choice(
            "lloyd", 2, 32, 8, 4, superblock=256, factor_dtype="int8"
        ): "2 bits, blocks of 32, rank 8, Lloyd levels, 4-bit scales under bfloat16, superblocks of 256, int8 factors",
        Choice("int", 8, 32, 8, 32, "float32"): "8 bits, blocks of 32, rank 8, signed integers, float32 scales",
    }
    assert [configuration_name(choice) for choice in told] == list(told.values())

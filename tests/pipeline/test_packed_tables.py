"""The chain with embedding and head as 8-bit integers: bytes, what is reused, what every stage makes of them."""

import json
from pathlib import Path

import pytest
import torch
from pipeline.test_chain import FAMILIES, Recorder
from safetensors.torch import load_file, save_file
from tiny import save_settings, save_texts, save_tiny_model
from transformers import AutoModelForCausalLM

from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import QloraPipeError, StageError, WeightError
from qlora_pipe.frontier import read_curve
from qlora_pipe.inspection import describe
from qlora_pipe.known import CHAIN
from qlora_pipe.plan import know
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import decomposed_model, packed_modules, pruned_model, tunable_model
from qlora_pipe.stages.packing import write_packed_model
from qlora_pipe.verify import verify_path
from quant.embedding import PackedEmbedding, TiedHead, quantize_rows
from quant.linear import PackedLinear

INT8 = ("decompose.embeddings=int8", "recover.base=decomposed")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def folder_of(family: str, place: Path) -> Path:
    save_tiny_model(place / "model", family, **FAMILIES[family])
    save_texts(place)
    save_settings(place)
    return place


@pytest.fixture(scope="module", params=["gemma3_text", "mistral"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: tied, scaled and refined, or none of it."""
    folder = folder_of(request.param, tmp_path_factory.mktemp("tables"))
    refined = ("refine.enabled=true", "refine.steps=2") if request.param == "gemma3_text" else ()
    compile_model(load(folder / "tiny.yaml", (*INT8, *refined)), Recorder())
    return folder


def names_of(folder: Path) -> set[str]:
    return {EMBEDDING} if "gemma" in (folder / "model/config.json").read_text() else {EMBEDDING, HEAD}


def context(folder: Path) -> Context:
    settings = load(folder / "run/config.yaml")
    artifacts = compile_model(settings, Recorder())
    run = folder / "run"
    base = (run / "base").resolve()
    allocation = read_allocation(json.loads((run / "allocate/allocation.json").read_text()))
    return Context(settings, know(settings, base).with_allocation(allocation), base, artifacts, run, run, Recorder())


def test_planned_bytes_are_written_bytes(finished: Path) -> None:
    run = finished / "run"
    plan = json.loads((run / "plan.json").read_text())
    assert plan["exact"]
    for stage in plan["stages"]:
        files = read_manifest(run / stage["name"]).files
        assert stage["files"] == {name: entry.bytes for name, entry in files.items() if ".safetensors" in name}
    assert len(list(verify_path(run))) == len(CHAIN)
    size = (run / "decompose/model.safetensors").stat().st_size
    rows = json.loads((run / "evaluate/metrics.json").read_text())
    assert {row["bytes"] for row in rows if row["model"] == "decomposed"} == {size}
    assert f"{EMBEDDING}.codes" in describe(run / "decompose")
    chosen = read_curve(run).chosen
    assert chosen is not None
    assert chosen.artifact_bytes == size


def test_tables_of_every_packed_model_are_the_checkpoint_s_rounded(finished: Path) -> None:
    run, base = finished / "run", load_file(finished / "model/model.safetensors")
    names, shapes = names_of(finished), context(finished).known.tables()
    assert set(shapes) == names
    for stage in ("decompose", "refine", "prune"):
        if not (run / stage / "model.safetensors").exists():
            continue
        stored = load_file(run / stage / "model.safetensors")
        for name in names:
            for buffer, tensor in quantize_rows(base[f"{name}.weight"], shapes[name]).items():
                assert torch.equal(stored[f"{name}.{buffer}"], tensor)
            assert f"{name}.weight" not in stored
        assert torch.equal(stored["model.norm.weight"], base["model.norm.weight"])


def test_exports_have_them_dequantised(finished: Path) -> None:
    base, shapes = load_file(finished / "model/model.safetensors"), context(finished).known.tables()
    merged = load_file(finished / "run/export/merged/model.safetensors")
    for name, shape in shapes.items():
        linear = PackedLinear(shape)
        linear.load_state_dict(quantize_rows(base[f"{name}.weight"], shape))
        assert torch.equal(merged[f"{name}.weight"], linear.dequantized())
    assert f"{HEAD}.weight" not in merged or HEAD in shapes


def test_models_are_packed_where_memory_counts_and_dense_elsewhere(finished: Path) -> None:
    seen = context(finished)
    small = pruned_model(seen, dense=False)
    heads = {"tied": TiedHead, "untied": PackedLinear}
    for model in (small, tunable_model(seen, seen.reader("decompose").read)):
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        assert isinstance(model.get_output_embeddings(), heads["untied" if HEAD in seen.known.tables() else "tied"])
    # No adapter for the head.
    assert len(packed_modules(small)) == 14
    dense = decomposed_model(seen)
    stock = AutoModelForCausalLM.from_pretrained(finished / "run" / seen.known.full_packed)
    assert type(dense.get_output_embeddings()) is torch.nn.Linear
    ids = torch.arange(30)[None] + 40
    with torch.no_grad():
        expected = stock(ids).logits
        scale = float(expected.abs().max())
        torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-4 * scale)


def test_the_error_table_is_taken_over_and_the_change_is_named(tmp_path: Path) -> None:
    config = folder_of("llama", tmp_path) / "tiny.yaml"
    budget = ("decompose.budget=140000B", "decompose.bits=[2,3,4,8]")
    before = compile_model(load(config, budget), Recorder(), until="decompose")
    assert "embeddings" not in json.dumps(before["decompose"].manifest.settings)
    recorder = Recorder()
    after = compile_model(load(config, (*budget, *INT8)), recorder, until="decompose")
    made = [line.partition(":")[0] for line in recorder.lines if ": made:" in line]
    assert made == ["allocate", "decompose"]
    assert "decompose: changed: embeddings changed: None -> int8" in recorder.lines
    sizes = [(each["decompose"].folder / "model.safetensors").stat().st_size for each in (before, after)]
    assert all(0.9 * 140_000 < size <= 140_000 for size in sizes)
    bits = [json.loads((run["allocate"].folder / "allocation.json").read_text())["bytes"] for run in (before, after)]
    # What the table no longer takes goes to the linear maps.
    assert bits[1] > bits[0] + 30_000


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (torch.nan, WeightError, "tensor model.embed_tokens.weight holds 1 NaN"),
        (1e8, StageError, "embeddings to keep"),
    ],
)
def test_a_table_that_cannot_be_packed_is_named(
    value: float, error: type[QloraPipeError], says: str, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path / "model")
    save_texts(tmp_path)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors[f"{EMBEDDING}.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    settings = load(save_settings(tmp_path), INT8)
    seen = Context(settings, know(settings), tmp_path / "model", {}, tmp_path, tmp_path, Recorder())
    linears = {name: {} for _, _, name in seen.known.architecture.linears()}
    with pytest.raises(error, match=r"model\.embed_tokens\.weight") as caught:
        write_packed_model(seen, linears.items())
    assert says in str(caught.value)

"""What we write, loaded by stock peft and transformers alone."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import save_settings, save_texts, save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import qlora_pipe.consumers
from qlora_pipe.cli import main
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    extra = {"query_pre_attn_scalar": 16, "sliding_window": 32} if request.param == "gemma3_text" else {}
    save_tiny_model(folder / "model", request.param, **extra)
    save_texts(folder)
    # A larger step, so that the adapter is far from zero.
    config = load(save_settings(folder), ("train.learning_rate=0.02", "recover.scales=[0.5]"))
    compile_model(config, Reporter(json_lines=True))
    return folder / "run"


def perplexity(model: PreTrainedModel | PeftModel, heldout: Path) -> float:
    """Stock cross entropy over the rows that the pipeline wrote down."""
    nll, tokens = 0.0, 0
    for line in heldout.read_text().splitlines():
        row = json.loads(line)
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        nll, tokens = nll + loss.item() * count, tokens + count
    return math.exp(nll / tokens)


def reported(run: Path, model: str, dataset: str = "task") -> float:
    rows = json.loads((run / "evaluate/metrics.json").read_text())
    return next(row["perplexity"] for row in rows if (row["model"], row["dataset"]) == (model, dataset))


def logits(model: PreTrainedModel | PeftModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_peft_reproduces_the_pipelines_perplexity(run: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    for dataset in ("task", "text"):
        heldout = run / f"evaluate/heldout/{dataset}.jsonl"
        assert perplexity(base, heldout) == pytest.approx(reported(run, "base", dataset), rel=1e-4)
    adapted = PeftModel.from_pretrained(base, run / "export/peft")
    assert json.loads((run / "recover/recovery.json").read_text())["scale"] == 0.5
    found = perplexity(adapted, run / "evaluate/heldout/task.jsonl")
    assert found == pytest.approx(reported(run, "full+recovered"), rel=1e-4)
    assert found != pytest.approx(reported(run, "base"), rel=1e-3)


def test_merged_folder_equals_the_adapter(run: Path) -> None:
    ids = torch.arange(40)[None] + 30
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, run / "export/peft")
    merged = AutoModelForCausalLM.from_pretrained(run / "export/merged")
    torch.testing.assert_close(logits(merged, ids), logits(adapted, ids), rtol=1e-4, atol=1e-4)


def test_small_folder_is_the_compact_model(run: Path) -> None:
    small = AutoModelForCausalLM.from_pretrained(run / "export/small")
    assert small.config.num_key_value_heads == 1
    found = perplexity(small, run / "evaluate/heldout/task.jsonl")
    assert found == pytest.approx(reported(run, "compact"), rel=1e-4)


def test_decomposed_folder_is_the_decomposed_model(run: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(run / "decompose", dtype=torch.float32)
    for dataset in ("task", "text"):
        found = perplexity(packed, run / f"evaluate/heldout/{dataset}.jsonl")
        assert found == pytest.approx(reported(run, "decomposed", dataset), rel=1e-4)


def test_exported_folders_bring_their_tokenizer(run: Path) -> None:
    for folder in ("export/merged", "export/small", "decompose"):
        tokenizer = AutoTokenizer.from_pretrained(run / folder)
        assert tokenizer.decode(tokenizer("the 3rd word").input_ids) == "the 3rd word"


def test_the_command_that_checks_them(run: Path, tmp_path: Path) -> None:
    if "llama" not in run.parent.name:
        pytest.skip("one family is enough for a command")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = CliRunner().invoke(main, ["check-consumers", str(run), "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "found.json").read_text())
    readers = {"peft": "peft", "merged": "transformers", "small": "transformers"}
    assert {row["folder"]: row["reader"] for row in rows} == readers | {"compressed-tensors": "compressed-tensors"}
    assert all(row["folder"] in done.output and row["difference"] <= row["tolerance"] == 1e-4 for row in rows)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("model.norm.weight", "DIFFERS"),
        ("model.layers.1.mlp.up_proj.weight_packed", "DIFFERS: codes of model.layers.1"),
    ],
)
def test_the_command_sees_what_differs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, says: str
) -> None:
    if "llama" not in run.parent.name:
        pytest.skip("one family is enough for a command")
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    file = tmp_path / "run/export/compressed-tensors/model.safetensors"
    tensors = load_file(file)
    tensors[tensor] = tensors[tensor] + 1
    save_file(tensors, file, {"format": "pt"})
    # Folders are checked one by one; the one that was changed is enough here.
    only = {"compressed-tensors": {}}
    monkeypatch.setattr(qlora_pipe.consumers, "read_json", lambda path: only)
    done = CliRunner().invoke(main, ["check-consumers", str(tmp_path / "run")])
    assert done.exit_code == 1, done.output
    assert says in done.output


def test_a_reader_that_is_not_installed_leaves_the_layout(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "llama" not in run.parent.name:
        pytest.skip("one family is enough for a command")
    monkeypatch.setattr(qlora_pipe.consumers, "find_spec", lambda name: None)
    check = qlora_pipe.consumers.Check(qlora_pipe.consumers.open_run(run)[0], run, "float32")
    assert check.verdict("compressed-tensors").note == "layout only"

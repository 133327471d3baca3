import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_pipe.artifacts.layout import TensorSpec, folder_files
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.artifacts.store import Store, Ticket
from qlora_pipe.artifacts.tensors import TensorWriter, dtype_code
from qlora_pipe.errors import ArtifactError
from qlora_pipe.known import CHAIN
from qlora_pipe.verify import verify_path
from quant.blockwise import quantize
from quant.buffers import packed_buffers
from quant.lowrank import store_factors
from quant.storage import Choice, PackedShape

Build = Callable[..., Any]
Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


def put(value: float) -> Callable[[Tensor], Tensor]:
    """Replace one entry."""

    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def verified(path: Path) -> list[str]:
    return list(verify_path(path))


def test_a_whole_run(run_builder: Build) -> None:
    run = run_builder().build()
    lines = verified(run)
    assert [line.split()[0] for line in lines] == list(CHAIN)
    for line in lines:
        stage, identity = line.split()[:2]
        assert read_manifest(run / stage).identity.startswith(identity)
        assert "whole" in line


@pytest.mark.parametrize("options", [{"compact": False}, {"layers": 1}])
def test_other_whole_runs(run_builder: Build, options: dict[str, Any]) -> None:
    assert len(verified(run_builder(**options).build())) == len(CHAIN)


def test_one_artifact(run_builder: Build) -> None:
    run = run_builder().build("prune")
    assert len(verified(run / "prune")) == 1
    assert len(verified(run)) == CHAIN.index("prune") + 1


def test_lines_come_as_stages_pass(run_builder: Build) -> None:
    run = run_builder(tamper={f"prune/model/{Q0}.scale_max": put(float("nan"))}).build("prune")
    seen = []
    with pytest.raises(ArtifactError, match=Q0):
        seen.extend(line.split()[0] for line in verify_path(run))
    assert seen == list(CHAIN[: CHAIN.index("prune")])


@pytest.mark.parametrize(
    "file",
    ["decompose/model.safetensors", "select/kept.json", "export/peft/adapter_model.safetensors"],
)
def test_one_changed_byte_is_found_and_the_file_named(run_builder: Build, file: str) -> None:
    run = run_builder().build()
    path = run / file
    body = bytearray(path.read_bytes())
    body[len(body) * 2 // 3] ^= 1
    path.write_bytes(body)
    with pytest.raises(ArtifactError, match=rf"{file}: the content differs from its SHA-256"):
        verified(run)
    with pytest.raises(ArtifactError, match=rf"{file}: the content differs"):
        verified(run / file.partition("/")[0])


def test_a_stale_stage_is_named_with_what_changed(run_builder: Build) -> None:
    builder = run_builder()
    run = builder.build()
    old = builder.identities["decompose"]
    with builder.store.lock():
        builder.make("decompose", {"seed": 1})
    now = builder.identities["decompose"]
    message = rf"stage refine is stale: it was made from decompose {old[:12]}, but decompose is now {now[:12]}"
    with pytest.raises(ArtifactError, match=message):
        verified(run)
    assert len(verified(run / "prune")) == 1


def test_a_missing_input_stage(run_builder: Build) -> None:
    run = run_builder().build("prune")
    (run / "decompose").unlink()
    with pytest.raises(ArtifactError, match=r"decompose: expected an artifact, found no manifest"):
        verified(run)


def test_a_broken_link(run_builder: Build) -> None:
    run = run_builder().build("calibrate")
    shutil.rmtree((run / "calibrate").resolve())
    with pytest.raises(ArtifactError, match=r"calibrate: expected an artifact, found no manifest"):
        verified(run)


def test_a_link_to_another_stage(run_builder: Build) -> None:
    run = run_builder().build("score")
    (run / "score").unlink()
    (run / "score").symlink_to((run / "calibrate").readlink())
    with pytest.raises(ArtifactError, match="score: expected an artifact of score, found one of calibrate"):
        verified(run)


def test_neither_a_run_nor_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a run folder or an artifact, found neither"):
        verified(tmp_path)


@pytest.mark.parametrize("planned", [{"model.safetensors": 1}, {}, {"more.safetensors": 5}])
def test_bytes_written_are_bytes_planned(run_builder: Build, planned: dict[str, int]) -> None:
    run = run_builder().build("decompose")
    path = run / "decompose" / "manifest.json"
    body = json.loads(path.read_text())
    body["planned"] = planned if len(planned) != 1 or "model.safetensors" in planned else body["planned"] | planned
    path.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match=r"decompose/\w+\.safetensors: planned \w+ bytes, found \w+"):
        verified(run)


@pytest.mark.parametrize(
    ("stage", "tensor", "change", "message"),
    [
        ("calibrate", f"moments/{Q0}.input", put(-1.0), f"{Q0}.input: expected values >= 0, found -1"),
        ("decompose", "model/model.norm.weight", put(float("nan")), "model.norm.weight holds NaN or Inf"),
        ("decompose", f"model/{DOWN1}.lowrank_left", put(float("inf")), f"{DOWN1}.lowrank_left holds NaN or Inf"),
        ("prune", f"model/{Q0}.scale_max", put(-0.5), f"{Q0}.scale_max: expected values >= 0, found -0.5"),
        ("decompose", f"model/{Q0}.levels", lambda t: t.flip(0), f"{Q0}.levels: expected increasing levels"),
        ("decompose", f"model/{Q0}.levels", put(float("inf")), f"{Q0}.levels holds NaN or Inf"),
        ("train", f"adapter/{Q0}.lora_A.weight", put(float("-inf")), f"{Q0}.lora_A.weight holds NaN or Inf"),
        ("compact", f"model/{Q0}.scale", put(0.0), f"{Q0}.scale: expected steps > 0, found 0"),
        ("compact", f"model/{DOWN1}.scale", put(-2.0), f"{DOWN1}.scale: expected steps > 0, found -2"),
    ],
)
def test_invariants_of_tensors(
    run_builder: Build, stage: str, tensor: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    run = run_builder(tamper={f"{stage}/{tensor}": change}).build(stage)
    with pytest.raises(ArtifactError, match=message):
        verified(run)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("codes", lambda t: t | 1 << 30, r"codes: expected 40 codes below 8 and zeros behind them, found others"),
        ("zero_codes", lambda t: t | 1 << 30, r"zero_codes: expected 5 codes below 8 and zeros behind them"),
        ("levels", lambda t: torch.arange(7.0), r"codes: expected 40 codes below 7"),
        ("scale", lambda t: t * 0, None),
        ("scale", lambda t: -t, None),
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_codes_of_a_packed_map(
    tmp_path: Path, tensor: str, change: Callable[[Tensor], Tensor], message: str | None, transposed: bool
) -> None:
    """Codes have a level each, and what pads their rows is zero; a scale may be zero or negative."""
    choice = Choice("uint", 3, 8, 2, 16, "float16")
    shape = PackedShape(*((24, 40) if transposed else (40, 24)), choice, transposed)
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    factors = store_factors(torch.ones(24, 2), torch.ones(2, 40), choice.factor_dtype)
    found = packed_buffers(quantize(weight, choice), factors, shape)

    def lines(tensors: dict[str, Tensor]) -> list[str]:
        layout = {f"m.{name}": TensorSpec(dtype_code(each.dtype), tuple(each.shape)) for name, each in tensors.items()}
        store, ticket = Store(tmp_path / "run"), Ticket("decompose", 2, {"change": len(list(tmp_path.rglob("*")))}, {})
        with store.lock(), store.writing(ticket) as out:
            with TensorWriter(out, layout) as writer:
                for name, each in tensors.items():
                    writer.write(f"m.{name}", each)
            store.commit(ticket, out, folder_files(layout))
        return verified(tmp_path / "run" / "decompose")

    assert len(lines(found)) == 1
    changed = found | {tensor: change(found[tensor])}
    if message is None:
        assert len(lines(changed)) == 1
        return
    with pytest.raises(ArtifactError, match=message):
        lines(changed)


def test_factors_of_one_adapter_have_one_rank(run_builder: Build) -> None:
    builder = run_builder()
    builder.build("prune")
    layout = {f"{Q0}.lora_A.weight": TensorSpec("F32", (4, 64)), f"{Q0}.lora_B.weight": TensorSpec("F32", (64, 3))}
    ticket = Ticket("train", 1, {}, {})
    with builder.store.writing(ticket) as out:
        with TensorWriter(out, layout, stem="adapter") as writer:
            for name, spec in layout.items():
                writer.write(name, torch.zeros(spec.shape))
        builder.store.commit(ticket, out, folder_files(layout, stem="adapter"))
    with pytest.raises(ArtifactError, match=r"lora_A\.weight has rank 4, .*lora_B\.weight has rank 3"):
        verified(builder.run / "train")


def edited(key: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda body: body | {key: change(body[key])}


def untie(body: dict[str, Any]) -> dict[str, Any]:
    body["choices"][Q0]["block_size"] = 128
    return body


def change_row(**values: Any) -> Callable[[Any], Any]:
    return lambda rows: [*rows[:-1], rows[-1] | values]


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("allocate/allocation.json", edited("bytes", lambda n: n + 1), r"the choices take \d+ bytes, the file says"),
        ("allocate/allocation.json", edited("budget_bytes", lambda n: n - 38), r"exceed the budget of"),
        ("allocate/allocation.json", edited("loss", lambda x: x * 1.001), r"the choices lose .*, the file says"),
        ("allocate/allocation.json", edited("bound", lambda x: x * 1.001), r"expected a bound between 0 and the loss"),
        ("allocate/allocation.json", untie, rf"{Q0}, .* are tied but differ"),
        ("allocate/allocation.json", lambda body: {}, r"expected a whole artifact, found KeyError"),
        ("score/table.json", lambda rows: rows | {Q0: [{"bytes": 0, "loss": 1.0}]}, r"expected bytes > 0"),
        ("score/table.json", lambda rows: rows | {Q0: [{"bytes": 1, "loss": float("nan")}]}, r"and a loss >= 0"),
        ("score/table.json", lambda rows: rows | {Q0: [{"bytes": 1, "loss": 1.0}]}, r"found none of grid, bits"),
        ("select/kept.json", lambda body: body | {"version": 9}, r"kept\.json: this release reads version 1"),
        ("select/selection.json", edited("index_map", lambda digest: digest[1:]), r"another index map than kept\.json"),
        ("select/selection.json", edited("model", lambda _: "1" * 64), r"is of the model 1+, the run has 0+;"),
        ("select/selection.json", edited("loss", lambda loss: loss + 1), r"loss does not follow from the table"),
        ("select/selection.json", edited("true_reduction", lambda x: x / 2), r"true_reduction does not follow"),
        ("select/scores.json", lambda rows: [{**rows[0], "kv": [2.0, 0.5]}, *rows[1:]], r"losses of layers\.0\.kv do"),
        ("select/scores.json", lambda rows: rows[:-1], r"expected a whole artifact, found IndexError"),
        ("recover/recovery.json", lambda body: body | {"scale": 0.75}, r"scale 0\.75 is not the best of"),
        ("recover/recovery.json", lambda body: body | {"scale": 3.0}, r"scale 3\.0 is not the best of"),
        ("recover/recovery.json", lambda body: body | {"index_map": "0"}, r"another kept\.json than select's"),
        ("evaluate/metrics.json", change_row(perplexity=0.99), r"c4: expected a finite perplexity >= 1, found 0\.99"),
        ("evaluate/metrics.json", change_row(perplexity=float("inf")), r"expected a finite perplexity"),
        ("evaluate/metrics.json", change_row(perplexity=None), r"expected a whole artifact"),
        ("evaluate/metrics.json", change_row(tokens=0), r"expected tokens, bytes and bits above 0"),
    ],
)
def test_invariants_of_documents(run_builder: Build, file: str, edit: Callable[[Any], Any], message: str) -> None:
    run = run_builder(edits={file: edit}).build(file.partition("/")[0])
    with pytest.raises(ArtifactError, match=message):
        verified(run)


def test_unsorted_and_doubled_indices(run_builder: Build) -> None:
    for kept in ("5,3", "3,3", "0-200"):

        def edit(body: dict[str, Any], kept: str = kept) -> dict[str, Any]:
            body["layers"][2]["ffn"] = kept
            return body

        run = run_builder(edits={"select/kept.json": edit}).build("select")
        with pytest.raises(ArtifactError, match=r"select/kept\.json: layer 2"):
            verified(run)


def test_matrices_have_the_rows_that_were_kept(run_builder: Build) -> None:
    builder = run_builder()
    layers = (replace(builder.kept.layers[0], kv_heads=(0,)), *builder.kept.layers[1:])
    builder.kept = replace(builder.kept, layers=layers)
    run = builder.build("prune")
    with pytest.raises(ArtifactError, match=rf"{Q0}\.codes has 64 rows, kept\.json keeps 32"):
        verified(run)


@pytest.mark.parametrize("stem", ["adapter", "compact_adapter"])
@pytest.mark.parametrize("change", [put(0.25), lambda tensor: torch.zeros_like(tensor)])
def test_the_recovered_adapter_is_the_trained_one(
    run_builder: Build, stem: str, change: Callable[[Tensor], Tensor]
) -> None:
    run = run_builder(tamper={f"recover/{stem}/{DOWN1}.lora_B.weight": change}).build("recover")
    stage = "train" if stem == "adapter" else "compact"
    with pytest.raises(ArtifactError, match=f"recover: {stem} {DOWN1} differs from the adapter of {stage}"):
        verified(run)
    # Only the run knows both.
    assert len(verified(run / "recover")) == 1


@pytest.mark.parametrize(
    ("factor", "change", "message"),
    [
        ("B", lambda tensor: tensor, None),
        ("B", lambda tensor: 3 * tensor, None),
        ("B", lambda tensor: 5 * tensor, "corrected by more than the limit"),
        ("A", put(0.25), "differs from the adapter of train"),
    ],
)
def test_of_a_corrected_adapter_b_may_have_moved_a_little(
    run_builder: Build, factor: str, change: Callable[[Tensor], Tensor], message: str | None
) -> None:
    edits = {"recover/recovery.json": lambda body: body | {"correction": "emloc"}}
    run = run_builder(edits=edits, tamper={f"recover/adapter/{DOWN1}.lora_{factor}.weight": change}).build("recover")
    if message is None:
        assert len(verified(run)) == CHAIN.index("recover") + 1
        return
    with pytest.raises(ArtifactError, match=f"recover: adapter {DOWN1} .*{message}"):
        verified(run)


def test_of_a_corrected_adapter_b_is_zero_where_structure_was_cut(run_builder: Build) -> None:
    gate = "model.layers.0.mlp.gate_proj"

    def change(tensor: Tensor) -> Tensor:
        tensor[1] = 0.1  # an odd channel, which was cut
        return tensor

    edits = {"recover/recovery.json": lambda body: body | {"correction": "emloc"}}
    run = run_builder(edits=edits, tamper={f"recover/adapter/{gate}.lora_B.weight": change}).build("recover")
    with pytest.raises(ArtifactError, match=f"adapter {gate} differs"):
        verified(run)

"""Two adapters and their base, against dense algebra in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_folder import Pair, random_pair, save_lora
from packed_folder import packed_model, save_packed
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model
from torch import Tensor

from qlora_pipe.adapters.base import Base
from qlora_pipe.artifacts.tensors import TensorReader
from qlora_pipe.cli import main
from qlora_pipe.errors import QloraPipeError, SourceError, UnsupportedModel, WeightError

Q, GATE, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"
SIDES = {Q: (64, 64), GATE: (192, 64), DOWN: (64, 192)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(base, tmp_path_factory.mktemp("packed") / "model")


def run(*words: object, fails: bool = False) -> str:
    result = CliRunner().invoke(main, ["adapter", "compare", *map(str, words)])
    assert result.exit_code == (2 if fails else 0), result.output
    return result.stderr if fails else result.stdout


def compared(*words: object) -> tuple[dict[str, Any], str]:
    file = Path(str(words[0])).parent / "out.json"
    text = run(*words, "--json", file)
    return json.loads(file.read_text()), text


def dense(pair: Pair, strength: float = 2.0) -> Tensor:
    return strength * pair[1].double() @ pair[0].double()


def test_figures_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    one = {name: random_pair(*SIDES[name], 4, seed) for seed, name in enumerate((Q, GATE))}
    two = {name: random_pair(*SIDES[name], 6, seed + 5) for seed, name in enumerate((GATE, DOWN))}
    # Half of what b writes to is what a writes to.
    two[GATE][1][:, :3] = one[GATE][1][:, :3]
    found, text = compared(save_lora(tmp_path / "a", one), save_lora(tmp_path / "b", two))
    a, b = ({name: dense(pair) for name, pair in pairs.items()} for pairs in (one, two))
    rows = found["matrices"]
    assert set(rows) == {Q, GATE, DOWN}
    for side, updates in (("a", a), ("b", b)):
        norms = {name: row["norm"][side] for name, row in rows.items() if row["norm"][side] is not None}
        assert norms == pytest.approx({name: float(update.norm()) for name, update in updates.items()}, rel=1e-6)
        whole = sum(float(update.square().sum()) for update in updates.values()) ** 0.5
        assert found["all"]["norm"][side] == pytest.approx(whole, rel=1e-6)
    inner = float((a[GATE] * b[GATE]).sum())
    assert rows[GATE]["cosine"] == pytest.approx(inner / float(a[GATE].norm() * b[GATE].norm()), rel=1e-5)
    norms = found["all"]["norm"]
    assert found["all"]["cosine"] == pytest.approx(inner / norms["a"] / norms["b"], rel=1e-5)
    for end, turn in (("outputs", lambda update: update), ("inputs", lambda update: update.T)):
        left, right = (torch.linalg.svd(turn(update[GATE]))[0][:, :rank] for update, rank in ((a, 4), (b, 6)))
        overlap = float((left.T @ right).square().sum()) / 4
        assert rows[GATE]["overlap"][end] == found["all"]["overlap"][end] == pytest.approx(overlap, abs=1e-6)
    assert rows[GATE]["overlap"]["outputs"] > 0.75 > rows[GATE]["overlap"]["inputs"]
    assert rows[Q]["cosine"] is rows[Q]["overlap"]["outputs"] is None
    assert f"{rows[GATE]['cosine']:.4g}" in text
    assert "spectral" not in found


def test_an_adapter_is_its_own_copy_and_nothing_has_no_direction(tmp_path: Path) -> None:
    lora_a, lora_b = random_pair(*SIDES[Q], 4, 0)
    one = save_lora(tmp_path / "one", {Q: (lora_a, lora_b)})
    # The same in another basis, of another strength.
    other = save_lora(tmp_path / "other", {Q: (2 * lora_a.flip(0), -lora_b.flip(1))}, lora_alpha=1)
    found = compared(one, other)[0]["matrices"][Q]
    assert found["cosine"] == pytest.approx(-1)
    assert found["overlap"] == pytest.approx({"outputs": 1, "inputs": 1})
    zero = save_lora(tmp_path / "zero", {Q: (lora_a, 0 * lora_b)})
    found = compared(one, zero)[0]
    assert found["matrices"][Q]["cosine"] is found["all"]["cosine"] is None
    assert found["matrices"][Q]["overlap"] == {"outputs": None, "inputs": None}


def intruders(weight: Tensor, update: Tensor, top: int, threshold: float) -> tuple[int, float, float]:
    """Count, energy and margin, vector by vector in float64."""
    before, base, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    after, values, _ = torch.linalg.svd(weight.double() + update, full_matrices=False)
    new = [j for j in range(top) if max(abs(float(column @ after[:, j])) for column in before.T) < threshold]
    energy = sum(float(values[j]) ** 2 for j in new) / float(values[:top].square().sum())
    return len(new), energy, float(torch.linalg.svdvals(update)[0] / base[0])


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_intruders_are_counted_against_the_base(base: Path, packed: Path, tmp_path: Path, kind: str) -> None:
    folder = packed if kind == "packed" else base
    lora_a, lora_b = random_pair(*SIDES[GATE], 2, 0)
    loud = {GATE: (lora_a, 20 * lora_b), DOWN: random_pair(*SIDES[DOWN], 2, 1)}
    quiet = {name: (pair[0], 1e-7 * pair[1]) for name, pair in loud.items()}
    found, text = compared(
        save_lora(tmp_path / "a", loud),
        save_lora(tmp_path / "b", quiet),
        "--base",
        folder,
        "--threshold",
        0.3,
        "--top",
        4,
    )
    if kind == "packed":
        model = packed_model(base, TensorReader(packed))
        weights = {name: model.get_submodule(name).dequantized() for name in loud}
    else:
        weights = {name: TensorReader(base).read(f"{name}.weight") for name in loud}
    for name, row in found["matrices"].items():
        count, energy, margin = intruders(weights[name], dense(loud[name]), 4, 0.3)
        said = row["spectral"]["a"]
        assert (said["intruders"], said["energy"], said["margin"]) == pytest.approx((count, energy, margin), rel=1e-3)
        assert row["spectral"]["b"]["intruders"] == 0
        assert min(row["spectral"]["b"]["cosines"]) > 0.9
    assert found["matrices"][GATE]["spectral"]["a"]["intruders"] == 2
    assert found["spectral"] == {"base": kind, "top": 4, "threshold": 0.3}
    assert f"of the {kind} weight with the adapter" in text
    assert "0 of 8" in text


def test_packed_weights_are_those_that_the_model_computes_with(base: Path, packed: Path) -> None:
    model, folder = packed_model(base, TensorReader(packed)), Base(packed)
    for name, sides in SIDES.items():
        assert torch.equal(folder.weight(name, sides), model.get_submodule(name).dequantized())
    assert folder.packed
    assert not Base(base).packed


def test_another_base_is_refused(base: Path, packed: Path, tmp_path: Path) -> None:
    one = save_lora(tmp_path / "one", {Q: random_pair(64, 64, 2, 0)})
    for name, sides, message in (
        ("model.layers.7.mlp.up_proj", (192, 64), "it has no linear map model.layers.7.mlp.up_proj"),
        (DOWN, (64, 128), rf"expected {DOWN}\.\w+ \[.*\], as the adapter's factors have it, found"),
        (DOWN, (65, 192), rf"{DOWN}.*give the model that it was trained on"),
        (GATE, (192, 31), rf"{GATE}.*give the model that it was trained on"),
    ):
        other = save_lora(tmp_path / f"{name}{sides}", {name: random_pair(*sides, 2, 0)})
        for folder in (base, packed):
            with pytest.raises(WeightError, match=message):
                Base(folder).check(name, sides)
        assert run(one, other, "--base", packed, fails=True).startswith("WeightError: ")


def test_a_base_that_cannot_be_read_is_refused(base: Path, packed: Path, tmp_path: Path) -> None:
    def copy(name: str, source: Path = base, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    cases: list[tuple[Path, type[QloraPipeError], str]] = [
        (tmp_path / "gone", SourceError, "expected a model folder with config.json, found none"),
        (copy("gptq", quantization_config={"quant_method": "gptq"}), UnsupportedModel, "give the unquantised model"),
        (
            copy("new", packed, quantization_config={"quant_method": "qlora_pipe", "version": 99}),
            SourceError,
            "version",
        ),
    ]
    (copy("empty") / "model.safetensors").unlink()
    cases.append((tmp_path / "empty", SourceError, "found neither"))
    for folder, error, message in cases:
        with pytest.raises(error, match=message):
            Base(folder)
    for source, tensor in ((base, f"{Q}.weight"), (packed, f"{Q}.levels")):
        file = copy(f"nan {tensor}", source) / "model.safetensors"
        tensors = {name: found.clone() for name, found in load_file(file).items()}
        tensors[tensor].view(-1)[0] = float("nan")
        save_file(tensors, file)
        with pytest.raises(WeightError, match=f"{Q}.* NaN or Inf|{Q} holds NaN or infinity"):
            Base(file.parent).weight(Q, SIDES[Q])


def test_an_adapter_beyond_float32_is_refused(base: Path, tmp_path: Path) -> None:
    lora_a, lora_b = random_pair(64, 64, 2, 0)
    folder = save_lora(tmp_path / "a", {Q: (1e30 * lora_a, 1e30 * lora_b)})
    assert f"WeightError: {Q}: the weight with what" in run(folder, folder, "--base", base, fails=True)


def test_figures_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "a", {Q: random_pair(64, 64, 2, 0)})
    said = run(folder, folder, "--json", tmp_path / "no" / "out.json", fails=True)
    assert "expected a path that can be written" in said

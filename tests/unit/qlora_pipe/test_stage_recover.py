"""The adapter corrected for what the weights it was trained on differ by from those it is put on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import context_of, save_settings, save_texts, save_tiny_model

from prune.correction import LIMIT
from prune.scatter import scatter_adapter
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError
from qlora_pipe.events import Reporter
from qlora_pipe.plan import make_plan
from qlora_pipe.stages import recover
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import packed_map, sliced_base_weight
from qlora_pipe.stages.packing import read_factors
from qlora_pipe.stages.train import strength
from qlora_pipe.verify import verify_path

GIVEN = ("recover.correction=emloc", "train.learning_rate=1e-2", "compact.enabled=false")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("correction")
    save_tiny_model(folder / "model")
    save_texts(folder)
    return save_settings(folder)


@pytest.fixture(scope="module")
def seen(config: Path) -> Context:
    """A run in which the corrected adapter is made to look better, at scale 1, than the other."""
    settings, losses = load(config, GIVEN), list[dict[float, float]]()
    real: Callable[..., dict[float, float]] = recover._loss_by_scale

    def measured(*given: Any) -> dict[float, float]:
        losses.append(real(*given))
        return losses[-1] | {1.0: losses[-1][1.0] / len(losses) ** 2}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recover, "_loss_by_scale", measured)
        artifacts = compile_model(settings, Reporter(json_lines=True), until="export")
    assert losses[0][0.0] == losses[1][0.0]
    assert losses[0][1.0] != losses[1][1.0]
    return context_of(settings, artifacts)


def test_the_recovered_adapter_is_the_corrected_one(seen: Context) -> None:
    """On the kept block the new weight with it does what the old one did with the trained one, for every input that A
    tells apart and where the limit leaves it whole. Tolerance: 1e-4 of the largest output."""
    small, full = (seen.reader(stage, "adapter").read for stage in ("train", "recover"))
    exact = 0
    for layer, role, name in seen.known.small.linears():
        lora_a, lora_b = read_factors(small, name)
        old = packed_map(seen, seen.reader("prune"), "prune", layer, role).dequantized()
        new = sliced_base_weight(seen, layer, role, name)[0]
        kept, shape = seen.index_map.kept_indices(layer, role), seen.known.architecture.linear_shapes()[name]
        found_a, found_b = read_factors(full, name)
        back = found_b[kept] if found_b.shape[0] != lora_b.shape[0] else found_b
        for found, expected in zip((found_a, found_b), scatter_adapter(lora_a, back, role, kept, shape), strict=True):
            assert torch.equal(found, expected)
        directions, sizes, inputs = torch.linalg.svd(lora_a, full_matrices=False)
        pairs = (old, lora_b), (new, back)
        outputs = [(weight + strength(seen) * b @ lora_a) @ inputs.T for weight, b in pairs]
        away = (outputs[1] - outputs[0]).abs().amax(dim=0) < 1e-4 * outputs[0].abs().max()
        wanted = ((new - old) @ inputs.T / strength(seen)).abs().mean(dim=0)
        limited = wanted > LIMIT * (lora_b @ directions * sizes).abs().mean(dim=0)
        assert torch.equal(away, ~limited), name
        exact += int(away.sum())
    assert exact > 10


def test_put_on_the_decomposed_model_it_is_corrected_the_other_way(seen: Context) -> None:
    """As for an adapter that was trained on the original weights: the difference changes its sign, and so does what is
    taken from B. Tolerance: fp32."""
    other = seen.config.recover.model_copy(update={"base": "decomposed"})
    turned = replace(seen, config=seen.config.model_copy(update={"recover": other}))
    there, back = recover._corrected(seen), recover._corrected(turned)
    small = seen.reader("train", "adapter")
    for name in (name for name in there if "lora_B" in name):
        factor = small.read(name)
        torch.testing.assert_close(
            there[name] + back[name], 2 * factor, rtol=1e-5, atol=1e-5 * float(factor.abs().max())
        )
        assert not torch.equal(there[name], factor)


def test_what_was_chosen_is_told_and_verified(seen: Context) -> None:
    report = seen.read_json("recover", "recovery.json")
    assert (report["correction"], report["scale"]) == ("emloc", 1.0)
    assert [other["correction"] for other in report["rejected"]] == ["none"]
    assert "recover" in {line.split()[0] for line in verify_path(Path(str(seen.config.run)))}
    said = seen.read_json("export", "export.json")["peft"]
    assert "B corrected" in said["factors"]
    assert not said["exact"]
    card = (Path(str(seen.config.run)) / "export/peft/README.md").read_text()
    assert "B corrected for the difference" in card


def test_the_plan_knows_what_it_takes(config: Path) -> None:
    with_it, without = (
        next(stage for stage in make_plan(load(config, given)).stages if stage.name == "recover")
        for given in (GIVEN, GIVEN[1:])
    )
    assert with_it.host_peak > without.host_peak


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("recover.base=decomposed",), "train.base: packed has those of recover.base: decomposed"),
        (("train.base=original",), "train.base: original has those of recover.base: original"),
        (
            ("prune.sparsity.pattern='2:4'", "prune.kv_ratio=0", "prune.ffn_ratio=0", "prune.align=64"),
            "would make up for the entries that prune.sparsity takes",
        ),
    ],
)
def test_nothing_to_correct_is_refused(config: Path, given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(config, (*GIVEN, *given))
    assert load(config, (*GIVEN, "train.base=original", "recover.base=decomposed"))


def test_the_first_is_kept_where_none_is_better(run_builder: Callable[..., Any]) -> None:
    def edit(body: dict[str, Any]) -> dict[str, Any]:
        return body | {"rejected": [{"correction": "emloc", "loss_by_scale": {"0.0": 3.06, "1.0": 2.6}}]}

    run = run_builder(edits={"recover/recovery.json": edit}).build("recover")
    assert json.loads((run / "recover/recovery.json").read_text())["rejected"]
    with pytest.raises(Exception, match="correction emloc is better than the chosen one"):
        list(verify_path(run))

"""The calibrate stage on a tiny model: what it writes, and what later stages read of it."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.architectures import SITE, SITES
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.errors import ConfigError, DataError
from qlora_pipe.events import Reporter
from qlora_pipe.plan import know
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.moments import Moments
from qlora_pipe.verify import verify_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    save_tiny_model(folder / "model", num_hidden_layers=3)
    save_texts(folder)
    save_settings(folder)
    return folder


def calibrated(folder: Path, run: str, *overrides: str) -> tuple[Context, Artifact]:
    config: Config = load(folder / "tiny.yaml", (*overrides, f"run={folder / run}"))
    artifacts = compile_model(config, Reporter(), until="calibrate")
    known = know(config, folder / "model")
    context = Context(config, known, folder / "model", artifacts, folder, folder, Reporter())
    return context, artifacts["calibrate"]


def test_later_stages_read_the_covariance_of_what_a_map_reads(folder: Path) -> None:
    context, artifact = calibrated(folder, "whole")
    assert len(list(verify_path(folder / "whole"))) == 2
    moments = context.reader("calibrate", "moments")
    for layer, role, name in context.known.architecture.linears():
        found = Moments(context).covariance(layer, role)
        assert found.dtype == torch.float32
        assert found.shape == moments.read(f"{name}.input").shape * 2
        assert torch.equal(found, found.T)
        assert torch.linalg.eigvalsh(found.double())[0] > -1e-6 * found.diagonal().max()
    body = json.loads((artifact.folder / "calibration.json").read_text())
    assert {key: body[key] for key in ("sequences", "tokens", "scored", "weighting")} == {
        "sequences": 2,
        "tokens": 128,
        "scored": 126,
        "weighting": "gradient",
    }
    assert len(body["layers"]) == 3
    for row in body["layers"]:
        assert set(row["top_token_share"]) == set(row["gradient_scale"]) == set(SITES) == set(SITE.values())
        assert all(0 < share < 1 for share in row["top_token_share"].values())
    scale = sum(moments.read(f"model.layers.1.self_attn.{role}_proj.gradient").sum().item() for role in "qkv")
    assert body["layers"][1]["gradient_scale"]["attention_input"] == pytest.approx(scale, rel=1e-5)


def test_without_weighting_the_diagonal_is_the_mean_square(folder: Path) -> None:
    context, _ = calibrated(folder, "plain", "calibrate.weighting=none")
    weighted, _ = calibrated(folder, "whole")
    moments = context.reader("calibrate", "moments")
    for layer, role, name in context.known.architecture.linears():
        expected = moments.read(f"{name}.input")
        torch.testing.assert_close(Moments(context).covariance(layer, role).diagonal(), expected, rtol=1e-5, atol=1e-8)
        assert not torch.allclose(Moments(weighted).covariance(layer, role).diagonal(), expected, rtol=1e-2)
        assert torch.equal(weighted.reader("calibrate", "moments").read(f"{name}.input"), expected)


def test_covariances_can_be_left_out(folder: Path) -> None:
    context, artifact = calibrated(folder, "diagonal", "calibrate.covariance=false")
    whole = calibrated(folder, "whole")[0].reader("calibrate", "moments")
    moments = context.reader("calibrate", "moments")
    assert set(moments) == {name for name in whole if not name.endswith(".covariance")}
    assert all(torch.equal(moments.read(name), whole.read(name)) for name in moments)
    assert "top_token_share" not in json.loads((artifact.folder / "calibration.json").read_text())["layers"][0]
    with pytest.raises(ConfigError, match=r"calibrate.covariance is false, but model.layers.1.ffn_hidden.covariance"):
        Moments(context).covariance(1, "down")


def test_a_short_text_is_refused_with_what_was_found(folder: Path) -> None:
    (folder / "short.txt").write_text("x" * 1000)
    message = r"short.txt \(data.calibration\): too short, expected 10 rows of 100 tokens .* found 9 \(900 tokens\)"
    with pytest.raises(DataError, match=message):
        calibrated(
            folder,
            "short",
            f"data.calibration={folder / 'short.txt'}",
            "calibrate.sequences=10",
            "calibrate.length=100",
        )

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny import save_settings, save_texts, save_tiny_model

import qlora_pipe.cli
from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.cli import main
from qlora_pipe.config_file import load
from qlora_pipe.errors import StageError
from qlora_pipe.known import CHAIN


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def passed(*words: object) -> Result:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(error: str, *words: object) -> str:
    """Exit code 2, nothing on standard output, one paragraph that begins with the error's name."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    paragraph = result.stderr.rstrip("\n")
    assert paragraph.startswith(f"{error}: ")
    assert "\n" not in paragraph
    return paragraph


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model")
    save_texts(folder)
    save_settings(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, Result]:
    """The configuration of a whole run, and what the run printed."""
    return folder / "tiny.yaml", passed("run", folder / "tiny.yaml")


def identities(run: Path) -> dict[str, str]:
    return {stage: read_manifest(run / stage).identity for stage in CHAIN if (run / stage).exists()}


def test_help_names_every_command() -> None:
    text = passed("--help").output
    for command in ("init", "schema", "plan", "run", "verify", "frontier", "inspect", "adapter", *CHAIN):
        assert f"\n  {command} " in text
    assert passed("-h").output == text


def test_init_writes_a_file_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    passed("init", "--model", "owner/name", "--budget", "2.75bits", "--output", path)
    config = load(path)
    assert (config.model, config.decompose.budget) == ("owner/name", "2.75bits")
    printed = passed("init", "--model", "owner/name", "--budget", "2.75bits")
    assert printed.stdout == path.read_text()


@pytest.mark.parametrize("budget", ["lots", "0bits", "-1GB", "33bits"])
def test_init_refuses_a_bad_budget(tmp_path: Path, budget: str) -> None:
    path = tmp_path / "new.yaml"
    assert budget in refused("ConfigError", "init", "--model", "m", "--budget", budget, "--output", path)
    assert not path.exists()


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert "exists already" in refused("ConfigError", "init", "--model", "m", "--output", path)
    assert path.read_text() == "mine"
    assert "cannot" not in refused("ConfigError", "init", "--model", "m", "--output", tmp_path / "no/such/folder.yaml")


def test_init_needs_a_model() -> None:
    assert call("init").exit_code == 2


def test_schema_is_json() -> None:
    assert json.loads(passed("schema").stdout)["title"] == "qlora-pipe configuration"


def test_plan(folder: Path) -> None:
    body = json.loads(passed("plan", folder / "tiny.yaml", "--json", "--set", "train.rank=6").stdout)
    assert [stage["name"] for stage in body["stages"]] == list(CHAIN)
    assert body["stages"] != json.loads(passed("plan", folder / "tiny.yaml", "--json").stdout)["stages"]
    text = passed("plan", folder / "tiny.yaml").stdout
    assert all(f"\n{stage} " in text for stage in CHAIN)


def test_run_ends_with_the_table_and_the_report(finished: tuple[Path, Result]) -> None:
    config, result = finished
    run = config.parent / "run"
    assert set(identities(run)) == set(CHAIN)
    assert f"report: {run / 'report.html'}" in result.stdout
    assert "full+recovered" in result.stdout
    assert "done in" not in result.stdout
    assert result.stderr.count("done in") == len(CHAIN)


def test_run_again_does_nothing_and_says_so(finished: tuple[Path, Result]) -> None:
    config, first = finished
    before = identities(config.parent / "run")
    again = passed("run", config)
    assert again.stderr.count("done already, nothing to do") == len(CHAIN)
    assert "done in" not in again.stderr
    assert again.stdout == first.stdout
    assert identities(config.parent / "run") == before


def test_events_as_json_lines(finished: tuple[Path, Result]) -> None:
    expected = [("begin", ""), *((kind, stage) for stage in CHAIN[:3] for kind in ("enter", "done")), ("end", "")]
    result = passed("run", finished[0], "--log-json", "--until", "score")
    rows = [json.loads(line) for line in result.stderr.splitlines()]
    assert [(row["event"], row["stage"]) for row in rows] == expected


def test_events_in_a_file(finished: tuple[Path, Result], tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    result = passed("run", finished[0], "--log-file", log, "--until", "score", "--from", "score")
    assert "done in" in result.stderr
    other = f"run={tmp_path / 'run'}"
    refused("ArtifactError", "run", finished[0], "--log-file", log, "--from", "score", "--set", other)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    made = next(row for row in rows if row["event"] == "made")
    assert made["stage"] == "score"
    assert min(made["seconds"], made["peak_bytes"], made["bytes"]) > 0
    steps = [row for row in rows if row["event"] == "progress"]
    assert [row["done"] for row in steps] == list(range(1, steps[0]["total"] + 1))
    assert steps[0]["item"] == "layer 0"
    assert steps[0]["seconds_left"] > steps[-1]["seconds_left"] == 0
    # The file is added to, and says how each run ended.
    assert [row["event"] for row in rows if row["event"] in ("begin", "end", "failed")] == [
        "begin", "end", "begin", "failed"
    ]  # fmt: skip
    assert "source is not done" in rows[-1]["message"]
    assert "can be written" in refused("ConfigError", "run", finished[0], "--log-file", tmp_path)


def test_status(finished: tuple[Path, Result], tmp_path: Path) -> None:
    assert "done up to" in passed("status", finished[0].parent / "run").stdout
    refused("ArtifactError", "status", tmp_path)


def test_until_and_a_stage_command_stop_there(finished: tuple[Path, Result], tmp_path: Path) -> None:
    elsewhere = f"run={tmp_path / 'run'}"
    result = passed("run", finished[0], "--until", "calibrate", "--set", elsewhere)
    assert set(identities(tmp_path / "run")) == {"source", "calibrate"}
    assert result.stdout.strip() == f"report: {tmp_path / 'run/report.html'}"
    passed("allocate", finished[0], "--set", elsewhere)
    assert set(identities(tmp_path / "run")) == {"source", "calibrate", "score", "allocate"}
    whole = identities(finished[0].parent / "run")
    assert identities(tmp_path / "run").items() <= whole.items()


def test_from_makes_anew(finished: tuple[Path, Result]) -> None:
    result = passed("run", finished[0], "--from", "export", "--until", "export")
    assert result.stderr.count("done in") == 1
    assert result.stderr.count("done already") == CHAIN.index("export")


def test_from_after_until_is_a_usage_error(folder: Path) -> None:
    result = call("run", folder / "tiny.yaml", "--from", "train", "--until", "prune")
    assert result.exit_code == 2
    assert "--from train comes after --until prune" in result.stderr
    assert "Usage:" in result.stderr


def test_an_unknown_stage_is_a_usage_error(folder: Path) -> None:
    assert call("run", folder / "tiny.yaml", "--until", "nowhere").exit_code == 2
    assert call("nowhere").exit_code == 2


def test_verify(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = finished[0].parent / "run"
    lines = passed("verify", run).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(CHAIN)
    assert len(passed("verify", run / "train").stdout.splitlines()) == 1
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    path = tmp_path / "copy/train/adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    result = call("verify", tmp_path / "copy")
    assert result.exit_code == 2
    assert result.stderr.startswith("ArtifactError: ")
    assert "adapter.safetensors" in result.stderr
    assert "nothing" not in refused("ArtifactError", "verify", tmp_path / "nowhere")


def test_frontier(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = finished[0].parent / "run"
    shown = passed("frontier", run, "--json", tmp_path / "curve.json", "--plot", tmp_path / "curve.svg").stdout
    assert shown == passed("frontier", run).stdout
    assert "<- this run, 6bits" in shown
    vertices = json.loads((tmp_path / "curve.json").read_text())["vertices"]
    assert f"{len(vertices)} vertices" in shown
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    assert "error table" in refused("ArtifactError", "frontier", tmp_path)
    assert ".png or .svg" in refused("ConfigError", "frontier", run, "--plot", tmp_path / "curve.gif")


def test_inspect(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = finished[0].parent / "run"
    assert f"{len(CHAIN)} of {len(CHAIN)} stages" in passed("inspect", run).stdout
    assert "adapter.safetensors" in passed("inspect", run / "train").stdout
    refused("ArtifactError", "inspect", tmp_path)


def test_an_exported_adapter_is_cut_and_compared_with_its_bases(finished: tuple[Path, Result], tmp_path: Path) -> None:
    run = finished[0].parent / "run"
    adapter, cut = run / "export" / "peft", tmp_path / "cut"
    assert "relative error" in passed("adapter", "truncate", adapter, "--rank", 2, "--output", cut).stdout
    lost = json.loads((cut / "adapter_report.json").read_text())["relative_error"]
    for base in ("base", "decompose"):
        file = tmp_path / f"{base}.json"
        shown = passed("adapter", "compare", adapter, cut, "--base", run / base, "--json", file).stdout
        found = json.loads(file.read_text())
        assert len(found["matrices"]) == 14
        # The best part of a matrix and the matrix: the cosine is the share of the norm that is left.
        assert found["all"]["cosine"] == pytest.approx((1 - lost**2) ** 0.5, rel=1e-6)
        assert found["all"]["overlap"]["inputs"] == pytest.approx(1)
        assert f"of the {'dense' if base == 'base' else 'packed'} weight" in shown
    assert "rank above 4" in refused(
        "ConfigError", "adapter", "truncate", adapter, "--rank", 4, "--output", tmp_path / "x"
    )


def test_errors_are_one_paragraph(folder: Path, tmp_path: Path) -> None:
    config = folder / "tiny.yaml"
    assert "train.rnk" in refused("ConfigError", "run", config, "--set", "train.rnk=3")
    assert "nowhere" in refused("ConfigError", "plan", tmp_path / "nowhere.yaml")
    assert "memory.host" in refused(
        "PlanError", "run", config, "--set", "memory.host=1MB", "--set", f"run={tmp_path / 'run'}"
    )
    (tmp_path / "file").write_text("")
    assert "can be written" in refused("ArtifactError", "run", config, "--set", f"run={tmp_path / 'file'}")


def test_a_defect_of_ours_is_not_dressed_up_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("ours")

    def refusing() -> None:
        raise StageError("theirs")

    monkeypatch.setattr(qlora_pipe.cli.schema, "callback", broken)
    result = call("schema")
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)
    monkeypatch.setattr(qlora_pipe.cli.schema, "callback", refusing)
    assert refused("StageError", "schema") == "StageError: theirs"

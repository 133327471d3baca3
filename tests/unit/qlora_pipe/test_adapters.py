"""Operations on LoRA folders, against dense sums in float64. PEFT judges in tests/numeric/test_adapter_oracles.py."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from lora_folder import Pair, random_pair, save_lora
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_pipe.adapters.folder import read_adapter
from qlora_pipe.artifacts.publish import new_folder
from qlora_pipe.artifacts.tensors import TensorWriter
from qlora_pipe.cli import main
from qlora_pipe.errors import ConfigError, SourceError, UnsupportedModel, WeightError

Q, UP, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
SIDES = {Q: (20, 24), UP: (30, 24), DOWN: (24, 30)}


def pairs(ranks: dict[str, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Pair]:
    return {name: random_pair(*SIDES[name], rank, seed + i, dtype) for i, (name, rank) in enumerate(ranks.items())}


def call(*words: object) -> Result:
    return CliRunner().invoke(main, ["adapter", *map(str, words)])


def passed(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def updates(folder: Path) -> dict[str, Tensor]:
    """Dense updates in float64 from the files alone, by PEFT's rules for settings that we write."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    found = {}
    for tensor in tensors:
        name = tensor.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if tensor.endswith(".lora_A.weight"):
            rank = config.get("rank_pattern", {}).get(name, config["r"])
            alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
            lora_a, lora_b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            assert rank == len(lora_a)
            found[name] = alpha / rank * lora_b.double() @ lora_a.double()
    return found


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_report.json").read_text())


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[dict[str, float], float]:
    """Relative errors, by matrix and of all as one vector."""
    assert found.keys() == exact.keys()
    differences = {name: float((found[name] - exact[name]).norm()) for name in exact}
    norms = {name: float(exact[name].norm()) for name in exact}
    whole = sum(value**2 for value in differences.values()) / sum(value**2 for value in norms.values())
    return {name: differences[name] / norms[name] for name in exact}, whole**0.5


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("a") / "one", pairs({Q: 8, UP: 8, DOWN: 3}))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of other ranks, strengths and maps."""
    return save_lora(tmp_path_factory.mktemp("b") / "two", pairs({UP: 4, DOWN: 2}, 7), alpha_pattern={DOWN: 5})


def test_settings_mean_what_they_mean_to_peft(tmp_path: Path) -> None:
    folder = save_lora(
        tmp_path / "a",
        pairs({Q: 4, UP: 4, DOWN: 9}),
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"layers.1.mlp.down_proj": 9, "proj": 2},
        alpha_pattern={"mlp.*_proj": 3, "q_proj": 1, "up_proj": 100},
    )
    sites = read_adapter(folder).sites
    assert {name: site.strength for name, site in sites.items()} == {Q: 0.5, UP: 1.5, DOWN: 1.0}
    assert {name: site.rank for name, site in sites.items()} == {Q: 4, UP: 4, DOWN: 9}
    assert {name: site.sides for name, site in sites.items()} == SIDES


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_truncation_is_the_best_of_its_rank_and_says_what_it_loses(
    one: Path, tmp_path: Path, dtype: str | None
) -> None:
    out = tmp_path / "out"
    text = passed("truncate", one, "--rank", 3, "--output", out, *(("--dtype", dtype) if dtype else ()))
    exact, found, said = updates(one), updates(out), report(out)
    best = {}
    for name, update in exact.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        best[name] = u[:, :3] * s[:3] @ vh[:3]
        torch.testing.assert_close(found[name], best[name], atol=2e-2 if dtype else 1e-6, rtol=0)
    by_name, whole = errors(found, exact)
    assert {name: row["relative_error"] for name, row in said["matrices"].items()} == pytest.approx(
        by_name, rel=1e-6, abs=1e-12
    )
    assert said["relative_error"] == pytest.approx(whole, rel=1e-6)
    assert 0.02 < whole < 0.5
    assert f"{said['relative_error']:.2e}" in text
    # A matrix of that rank already is left as it is.
    stored, before = (load_file(folder / "adapter_model.safetensors") for folder in (out, one))
    if dtype is None:
        for side in "AB":
            key = f"base_model.model.{DOWN}.lora_{side}.weight"
            assert torch.equal(stored[key], before[key])
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if dtype else torch.float32}


@pytest.mark.parametrize("energy", [0.99, 0.999])
def test_energy_gives_each_matrix_its_own_rank(one: Path, tmp_path: Path, energy: float) -> None:
    passed("truncate", one, "--energy", energy, "--output", tmp_path / "out")
    exact, said = updates(one), report(tmp_path / "out")
    ranks = {}
    for name, update in exact.items():
        shares = torch.linalg.svdvals(update).square()
        ranks[name] = int((shares.cumsum(0) / shares.sum() < energy).sum()) + 1
    assert {name: row["rank"] for name, row in said["matrices"].items()} == ranks
    assert len(set(ranks.values())) > 1
    by_name, _ = errors(updates(tmp_path / "out"), exact)
    assert max(by_name.values()) <= (1 - energy) ** 0.5


def test_a_sum_is_exact_over_other_ranks_strengths_and_maps(one: Path, two: Path, tmp_path: Path) -> None:
    passed("add", one, two, "--weights", "1,-0.7", "--output", tmp_path / "out")
    exact, other, found = updates(one), updates(two), updates(tmp_path / "out")
    for name in SIDES:
        expected = exact[name] - 0.7 * other.get(name, torch.zeros(SIDES[name]))
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)
    said = report(tmp_path / "out")
    assert {name: row["rank"] for name, row in said["matrices"].items()} == {Q: 8, UP: 12, DOWN: 5}
    assert said["relative_error"] < 1e-7
    assert [row["weight"] for row in said["inputs"]] == [1, -0.7]


def test_factors_side_by_side_are_those_that_are_stored(one: Path, tmp_path: Path) -> None:
    # 2 / 3 has no end in binary.
    parts = [save_lora(tmp_path / name, pairs({Q: 3}, seed), lora_alpha=2) for name, seed in (("a", 0), ("b", 5))]
    passed("subtract", *parts, "--output", tmp_path / "out")
    (a_one, b_one), (a_two, b_two) = (pairs({Q: 3}, seed)[Q] for seed in (0, 5))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored[f"base_model.model.{Q}.lora_A.weight"], torch.cat([a_one, a_two]))
    assert torch.equal(stored[f"base_model.model.{Q}.lora_B.weight"], torch.cat([b_one, -b_two], dim=1))
    assert report(tmp_path / "out")["relative_error"] < 1e-15


def test_a_sum_can_be_cut(one: Path, two: Path, tmp_path: Path) -> None:
    # Of more rank than one matrix has in all.
    passed("add", one, two, "--rank", 6, "--output", tmp_path / "out")
    exact, other, found = updates(one), updates(two), updates(tmp_path / "out")
    exact = {name: update + other.get(name, 0) for name, update in exact.items()}
    for name, update in exact.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        torch.testing.assert_close(found[name], u[:, :6] * s[:6] @ vh[:6], atol=1e-6, rtol=0)
    assert report(tmp_path / "out")["relative_error"] == pytest.approx(errors(found, exact)[1], rel=1e-5)


def test_more_rank_than_sides_and_nothing_at_all(tmp_path: Path) -> None:
    lora_a, lora_b = random_pair(4, 6, 9, 0)
    wide = save_lora(tmp_path / "wide", {"head": (lora_a, lora_b), "body": (lora_a, 0 * lora_b)})
    passed("truncate", wide, "--rank", 8, "--output", tmp_path / "out")
    assert {row["rank"] for row in report(tmp_path / "out")["matrices"].values()} == {4}
    assert report(tmp_path / "out")["relative_error"] < 1e-6
    passed("truncate", wide, "--energy", 0.9, "--output", tmp_path / "energy")
    assert report(tmp_path / "energy")["matrices"]["body"] == {
        "rank": 1,
        "of": 9,
        "norm": 0,
        "error": 0,
        "relative_error": 0,
    }


def test_the_widest_dtype_holds_a_sum(one: Path, tmp_path: Path) -> None:
    halves = [save_lora(tmp_path / str(dtype), pairs({Q: 4}, 3, dtype)) for dtype in (torch.float16, torch.bfloat16)]
    for number, folders in enumerate((halves[:1] * 2, halves, [halves[0], one])):
        passed("add", *folders, "--output", tmp_path / f"out{number}")
    found = [load_file(tmp_path / f"out{number}" / "adapter_model.safetensors") for number in range(3)]
    assert [{tensor.dtype for tensor in part.values()} for part in found] == [
        {torch.float16},
        {torch.float32},
        {torch.float32},
    ]


def test_settings_of_the_first_are_kept(one: Path, two: Path, tmp_path: Path) -> None:
    said = {"lora_dropout": 0.1, "target_modules": ".*mlp.*", "eva_config": {"rho": 2}, "use_rslora": True}
    same = save_lora(tmp_path / "a", pairs({UP: 4, DOWN: 2}, 7), **said)
    passed("truncate", same, "--rank", 2, "--output", tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["target_modules"], config["r"]) == (0.1, ".*mlp.*", 2)
    # Ranks have changed, and strengths would follow their roots.
    assert config["use_rslora"] is False
    assert "eva_config" not in config
    passed("add", same, one, "--output", tmp_path / "sum")
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["target_modules"] == sorted(SIDES)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_not_whole_is_not_there(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = TensorWriter.write, []

    def fails(self: TensorWriter, name: str, tensor: Tensor) -> None:
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        if len(seen) == 3:
            raise OSError(5, "broken")
        write(self, name, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(TensorWriter, "write", fails)
        assert call("truncate", one, "--rank", 2, "--output", tmp_path / "out").exit_code
    assert len(seen) == 3
    assert all(len(names) == 1 and fnmatch(names[0], ".out.*.partial") for names in seen)
    assert list(tmp_path.iterdir()) == []
    passed("truncate", one, "--rank", 2, "--output", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(files(tmp_path / "out")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_report.json",
    ]
    passed("truncate", one, "--rank", 2, "--output", tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_nothing_is_overwritten(one: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "out exists already" in refused("truncate", one, "--rank", 2, "--output", tmp_path / "out")
    assert "cannot be written" not in refused("truncate", one, "--rank", 2, "--output", tmp_path / "no" / "out")
    os.symlink(tmp_path / "gone", tmp_path / "link")
    assert "link exists already" in refused("truncate", one, "--rank", 2, "--output", tmp_path / "link")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_two_at_once_do_not_touch_each_others(tmp_path: Path) -> None:
    def both() -> None:
        with new_folder(tmp_path / "out") as late, new_folder(tmp_path / "out") as early:
            (early / "a").write_text("first")
            (late / "a").write_text("second")

    with pytest.raises(ConfigError, match="out exists already"):
        both()
    assert files(tmp_path / "out") == {"a": b"first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # As any folder that is made there.
    (tmp_path / "plain").mkdir()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_requests_that_cannot_be_met_are_refused(one: Path, two: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out")
    assert "no matrix has a rank above 8" in refused("truncate", one, "--rank", 8, *out)
    for words in ((), ("--rank", 2, "--energy", 0.5)):
        assert "one of --rank and --energy" in refused("truncate", one, *words, *out)
    assert "at least 1, found 0" in refused("truncate", one, "--rank", 0, *out)
    for energy in ("0", "1.01", "nan"):
        assert "a share above 0" in refused("truncate", one, "--energy", energy, *out)
    assert "one for each of 2 adapters, found 3" in refused("add", one, two, "--weights", "1,2,3", *out)
    assert "such as 1,0.5, found 'half,1'" in refused("add", one, two, "--weights", "half,1", *out)
    assert "finite numbers" in refused("add", one, two, "--weights", "inf,1", *out)
    for words in (("--top", 0), ("--threshold", 0), ("--threshold", 1.5)):
        assert "expected --top of 1 at least" in refused("compare", one, two, *words)
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_other_models_are_not_mixed(one: Path, tmp_path: Path) -> None:
    other = save_lora(tmp_path / "other", pairs({Q: 2}), base_model_name_or_path="org/other")
    for operation in ("add", "subtract"):
        said = refused(operation, one, other, "--output", tmp_path / "out")
        assert "org/model and org/other" in said
        assert "say --force" in said
    passed("add", one, other, "--force", "--output", tmp_path / "out")
    assert "org/model and org/other" in passed("compare", one, other)
    odd = save_lora(tmp_path / "odd", {Q: random_pair(20, 25, 2, 0)})
    for words in (("add", one, odd, "--force", "--output", tmp_path / "new"), ("compare", one, odd)):
        assert f"{Q} is 20 x 24 in" in refused(*words)


def test_an_init_is_of_the_same_adapter(one: Path, two: Path, tmp_path: Path) -> None:
    assert f"found {Q} in one of" in refused("subtract", one, two, "--output", tmp_path / "out")


def test_an_overflow_is_an_error(tmp_path: Path) -> None:
    lora_a, lora_b = pairs({Q: 2})[Q]
    big = save_lora(tmp_path / "big", {Q: (lora_a, 1e6 * lora_b)})
    said = refused("add", big, "--dtype", "float16", "--output", tmp_path / "out")
    assert f"{Q}: the factors overflow F16; give --dtype float32" in said


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("use_qalora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["experts"]),
        ("alora_invocation_tokens", [3]),
        ("a_setting_of_tomorrow", {"on": 1}),
    ],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(tmp_path: Path, setting: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=rf"found {setting} set.*merge it into its model with PEFT"):
        read_adapter(save_lora(tmp_path / "a", pairs({Q: 2}), **{setting: value}))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard-of"])
def test_an_init_that_moved_the_base_is_for_subtract_alone(tmp_path: Path, init: str) -> None:
    folder = save_lora(tmp_path / "a", pairs({Q: 2}), init_lora_weights=init)
    with pytest.raises(UnsupportedModel, match=f"init_lora_weights '{init}'.*adapter subtract"):
        read_adapter(folder)
    start = save_lora(tmp_path / "b", pairs({Q: 2}, 1))
    passed("subtract", folder, start, "--output", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["init_lora_weights"] is True
    # LoftQ's base and start are not the model that they came from.
    said = json.loads((tmp_path / "out" / "adapter_report.json").read_text())["approximate"]
    assert (said is not None) == (init == "loftq")


def test_other_kinds_of_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="peft_type LORA, found 'LOHA'; PEFT's convert_to_lora"):
        read_adapter(save_lora(tmp_path / "a", pairs({Q: 2}), peft_type="LOHA"))
    folder = save_lora(tmp_path / "b", pairs({Q: 2}))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in (("embed.lora_embedding_A", torch.ones(2, 9)), ("conv.lora_A.weight", torch.ones(2, 3, 1, 1))):
        save_file({**tensors, f"base_model.model.{name}": tensor}, folder / "adapter_model.safetensors")
        with pytest.raises(UnsupportedModel, match=f"found base_model.model.{name}"):
            read_adapter(folder)


def damages() -> Iterator[tuple[str, Any, type[Exception], str]]:
    """(name, what damages a folder, error, message)."""

    def weights(change: Any) -> Any:
        def damage(folder: Path) -> None:
            path = folder / "adapter_model.safetensors"
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            change(tensors, f"base_model.model.{Q}.lora_")
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

        return damage

    def setting(**changes: Any) -> Any:
        def damage(folder: Path) -> None:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return damage

    def cut(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-8])

    def nan(tensors: dict[str, Tensor], key: str) -> None:
        tensors[f"{key}B.weight"][1, 1] = float("nan")

    def narrower(tensors: dict[str, Tensor], key: str) -> None:
        tensors[f"{key}A.weight"] = tensors[f"{key}A.weight"][:1]

    def empty(tensors: dict[str, Tensor], key: str) -> None:
        tensors |= {f"{key}A.weight": torch.zeros(0, 24), f"{key}B.weight": torch.zeros(20, 0)}

    def integers(tensors: dict[str, Tensor], key: str) -> None:
        tensors[f"{key}A.weight"] = tensors[f"{key}A.weight"].int()

    yield "no folder", shutil.rmtree, SourceError, "expected a PEFT adapter with adapter_config.json, found none"
    yield "no config", lambda f: (f / "adapter_config.json").unlink(), SourceError, "expected a PEFT adapter with"
    yield "no weights", lambda f: (f / "adapter_model.safetensors").unlink(), SourceError, "found neither"
    yield "config cut", lambda f: (f / "adapter_config.json").write_text('{"r": 2'), SourceError, "expected JSON"
    yield "config a list", lambda f: (f / "adapter_config.json").write_text("[]"), SourceError, "a JSON object"
    yield "weights cut", cut, SourceError, "truncated: expected"
    yield "no tensors", weights(lambda tensors, key: tensors.clear()), SourceError, "expected LoRA factors, found no"
    yield "nan", weights(nan), WeightError, r"lora_B.weight holds 1 NaN or Inf"
    yield "one side", weights(lambda tensors, key: tensors.pop(f"{key}B.weight")), WeightError, "has lora_A alone"
    yield "shapes", weights(narrower), WeightError, r"expected factors \[rank, in\] and \[out, rank\] of"
    yield "no rank", weights(empty), WeightError, r"expected factors .*, found \[0, 24\] and \[20, 0\]"
    yield "integers", weights(integers), WeightError, "expected floating factors of .*, found I32 and F32"
    yield "rank", setting(r=3), WeightError, "rank 3, its factors have rank 2; correct r"
    yield "pattern", setting(rank_pattern={"q_proj": 9}), WeightError, "rank 9, its factors have rank 2"
    yield "no number", setting(lora_alpha="16"), SourceError, "expected numbers as lora_alpha and in alpha_pattern"
    yield "no alpha", setting(lora_alpha=None), SourceError, "expected numbers as lora_alpha"
    yield "a list", setting(rank_pattern=[1]), SourceError, "expected numbers as r and in rank_pattern"
    yield "no regexp", setting(alpha_pattern={"(": 1}), SourceError, "expected numbers as lora_alpha"


@pytest.mark.parametrize(("damage", "error", "message"), [pytest.param(*rest, id=name) for name, *rest in damages()])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Any, error: type[Exception], message: str) -> None:
    folder = save_lora(tmp_path / "a", pairs({Q: 2}))
    damage(folder)
    with pytest.raises(error, match=message):
        read_adapter(folder).factors(Q)
    said = refused("add", folder, "--output", tmp_path / "out")
    assert said.startswith(f"{error.__name__}: ")
    assert not (tmp_path / "out").exists()

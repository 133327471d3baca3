import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prune.groups import ROLES
from qlora_pipe.allocation import offered, pose, read_allocation, recheck, record
from qlora_pipe.architectures import linear_name
from qlora_pipe.config_rules import Rule
from qlora_pipe.errors import ArtifactError
from qlora_pipe.rules import narrow
from qlora_pipe.verify import verify_path
from quant.storage import Choice
from solver import CertificateError, solve

LAYERS = 3
RULES = (
    Rule(roles=("down",), name="*.0.*", min_bits=4),
    Rule(layers=(0, -1), roles=("down",), min_bits=3),
    Rule(layers=(1,), roles=("o",), bits=3, block_size=32),
)
TIES = (("q", "k", "v"), ("gate", "up"))
DOWN0, OUT1 = linear_name(0, "down"), linear_name(1, "o")


def table(seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Losses that fall with the bytes, and differ between matrices."""
    chooser = random.Random(seed)
    found = {}
    for layer in range(LAYERS):
        for role in ROLES:
            scale = 10 ** chooser.uniform(-1, 1)
            found[linear_name(layer, role)] = [
                Choice("nf", bits, block, 0).to_json()
                | {
                    "bytes": 100 * bits + 3200 // block,
                    "loss": scale * chooser.uniform(0.8, 1.2) * 4.0**-bits,
                    "error": 0.01 * scale * 4.0**-bits,
                }
                for bits in (2, 3, 4)
                for block in (32, 64)
            ]
    return found


def solved(rows: dict[str, list[dict[str, Any]]], budget: int, exact: bool = True) -> dict[str, Any]:
    narrowed = narrow(offered(rows), RULES, TIES)
    problem = pose(rows, narrowed, budget)
    body = record(rows, RULES, narrowed, problem, solve(problem, exact=exact))
    return json.loads(json.dumps(body))


@pytest.mark.parametrize("budget", [6700, 7500, 8800, 99999])
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_recorded_checks_out(budget: int, exact: bool) -> None:
    rows = table()
    body = solved(rows, budget, exact)
    recheck(rows, body)
    assert body["budget_bytes"] == budget
    assert body["bytes"] == sum(row["bytes"] for row in body["choices"].values()) <= budget
    assert math.isclose(body["loss"], sum(row["loss"] for row in body["choices"].values()), rel_tol=1e-12)
    chosen = read_allocation(body)
    assert chosen[DOWN0].bits == 4
    assert chosen[linear_name(2, "down")].bits >= 3
    assert (chosen[OUT1].bits, chosen[OUT1].block_size) == (3, 32)
    assert len({chosen[linear_name(1, role)] for role in "qkv"}) == 1


def test_ties_rules_fixed_and_floored_are_told() -> None:
    body = solved(table(), 7500)
    assert body["ties"][:2] == [[linear_name(0, r) for r in "qkv"], [linear_name(0, r) for r in ("gate", "up")]]
    assert body["rules"][1] == {
        "layers": [0, -1],
        "roles": ["down"],
        "min_bits": 3,
        "matrices": [DOWN0, linear_name(2, "down")],
    }
    assert body["fixed"] == [OUT1]
    assert body["floored"] == {DOWN0: 4, linear_name(2, "down"): 3}


def choose(body: dict[str, Any], rows: dict[str, list[dict[str, Any]]], name: str, index: int) -> None:
    """Another row of the table for `name`, cost and loss told as they then are."""
    body["choices"][name] = rows[name][index]
    body["bytes"] = sum(row["bytes"] for row in body["choices"].values())
    body["loss"] = math.fsum(row["loss"] for row in body["choices"].values())


def rescale(key: str, factor: float) -> Callable[[dict[str, Any], Any], None]:
    def change(body: dict[str, Any], rows: Any) -> None:
        body[key] *= factor

    return change


def drop_matrix(body: dict[str, Any], rows: Any) -> None:
    del body["rules"][0]["matrices"][0]


def claim_optimal(body: dict[str, Any], rows: Any) -> None:
    choose(body, rows, linear_name(0, "o"), 0)
    body.update(optimal=True, bound=body["loss"], gap=0.0)


def forge_loss(body: dict[str, Any], rows: Any) -> None:
    body["choices"][OUT1]["loss"] /= 2
    body["loss"] = math.fsum(row["loss"] for row in body["choices"].values())


CORRUPTIONS: dict[str, tuple[bool, Callable[[dict[str, Any], Any], None], str]] = {
    "floor": (True, lambda body, rows: choose(body, rows, DOWN0, 0), f"{DOWN0}' has no choice"),
    "fixed": (True, lambda body, rows: choose(body, rows, OUT1, 0), f"{OUT1}' has no choice"),
    "tie": (True, lambda body, rows: choose(body, rows, linear_name(1, "k"), 0), "tied items"),
    "cost": (True, lambda body, rows: body.update(bytes=body["bytes"] - 1), "the selection costs"),
    "budget": (True, lambda body, rows: body.update(budget_bytes=body["bytes"] - 1), "over the budget"),
    "loss": (True, rescale("loss", 1 + 1e-6), "the selection loses"),
    "forged loss": (True, forge_loss, "the selection loses"),
    "loss error": (True, rescale("loss_error", 0.5), "loss_error does not follow"),
    "claimed optimal": (True, claim_optimal, "not optimal: another choice of .*layers.0.self_attn.o_proj"),
    "bound": (False, rescale("bound", 0.999), "the bound is"),
    "bound up": (False, rescale("bound", 1.001), "the bound is"),
    "gap": (False, lambda body, rows: body.update(gap=body["gap"] + 1e-4), "the gap is"),
    "multiplier": (False, rescale("multiplier", 1.5), "the bound is"),
    "matrices": (True, drop_matrix, "rules does not follow"),
    "fixed list": (True, lambda body, rows: body.update(fixed=[]), "fixed does not follow"),
    "floored": (True, lambda body, rows: body["floored"].popitem(), "floored does not follow"),
}


@pytest.mark.parametrize(("exact", "corrupt", "message"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_false_statement_is_found(exact: bool, corrupt: Callable[..., None], message: str) -> None:
    rows = table()
    body = solved(rows, 7500, exact)
    corrupt(body, rows)
    with pytest.raises(CertificateError, match=message):
        recheck(rows, body)


def test_a_table_that_changed_is_found() -> None:
    rows = table()
    body = solved(rows, 7500)
    other = copy.deepcopy(rows)
    other[DOWN0][4]["loss"] *= 0.9
    other[DOWN0][5]["loss"] *= 0.9
    with pytest.raises(CertificateError, match="the selection loses"):
        recheck(other, body)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda body, rows: choose(body, rows, DOWN0, 0), rf"{DOWN0}' has no choice"),
        (lambda body, rows: body.update(gap=0.5), "the gap is"),
        (lambda body, rows: body["floored"].clear(), "floored does not follow from the table"),
        (lambda body, rows: body["rules"].append({"layers": [9], "bits": 2}), "there is no layer 9"),
        (lambda body, rows: body["rules"].append({"layers": [0]}), "expected a whole artifact"),
        (lambda body, rows: body.pop("multiplier"), r"expected a whole artifact, found KeyError\('multiplier'\)"),
    ],
)
def test_verify_re_checks_a_run(run_builder: Callable[..., Any], corrupt: Callable[..., None], message: str) -> None:
    rows = table()
    body = solved(rows, 7500) | {"bits_per_weight": 3.0}

    def build(change: Callable[..., None]) -> Path:
        told = copy.deepcopy(body)
        change(told, rows)
        edits = {"score/table.json": lambda _: rows, "allocate/allocation.json": lambda _: told}
        return run_builder(edits=edits).build("allocate")

    assert len(list(verify_path(build(lambda *_: None)))) == 4
    run = build(corrupt)
    with pytest.raises(ArtifactError, match=rf"allocat.*{message}"):
        list(verify_path(run))

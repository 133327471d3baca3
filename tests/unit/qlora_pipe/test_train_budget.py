import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe import layouts
from qlora_pipe.compile import compile_model
from qlora_pipe.config import Config
from qlora_pipe.config_file import load
from qlora_pipe.errors import BudgetError, ConfigError, PlanError
from qlora_pipe.events import Reporter
from qlora_pipe.known import choice_bytes, linear_budget
from qlora_pipe.memory import peak_bytes
from qlora_pipe.plan import check_memory, know, make_plan, plan_known, render_plan
from qlora_pipe.train_budget import LEAST_BITS

GIVEN, OFFERED = 6, ("decompose.budget=6bits", "decompose.ranks=[0, 4]", "prune.kv_ratio=0", "prune.ffn_ratio=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train_budget")
    save_tiny_model(folder / "model", intermediate_size=960, num_hidden_layers=4)
    save_texts(folder)
    save_settings(folder)
    return folder


def configured(folder: Path, *overrides: str) -> Config:
    """As known, with the bits and the structure that were found."""
    return know(load(folder / "tiny.yaml", (*OFFERED, *overrides))).config


def training(folder: Path, *overrides: str) -> int:
    """The plan's peak while training if all of the budget is spent, as it would be without train_budget."""
    known = know(load(folder / "tiny.yaml", (*OFFERED, *overrides)))
    peak = max(peak_bytes(stage, known)[0 if known.config.device == "cpu" else 1] for stage in ("align", "train"))
    whole = known.architecture
    unspent = linear_budget(whole, known.dtypes, known.config) - layouts.linear_bytes(known.decomposed(), whole)
    return peak + math.ceil(unspent * known.small.linear_weights() / whole.linear_weights())


def test_what_fits_stays_as_it_is(folder: Path) -> None:
    enough = f"train_budget={training(folder)}B"
    found = configured(folder, enough)
    assert found == load(folder / "tiny.yaml", (*OFFERED, enough))
    assert found.model_copy(update={"train_budget": None}) == configured(folder)


@pytest.mark.parametrize("more", [(), ("device=cuda",), ("align.enabled=true", "align.rank=2", "align.steps=1")])
def test_as_many_bits_stay_as_fit(folder: Path, more: tuple[str, ...]) -> None:

    def at(hundredths: int) -> int:
        return training(folder, *more, f"decompose.budget={hundredths / 100:g}bits")

    for limit in (at(300), at(420), (at(420) + at(440)) // 2):
        found = configured(folder, *more, f"train_budget={limit}B")
        most = round(100 * float(found.decompose.budget.removesuffix("bits")))
        assert at(most) <= limit < at(most + 1)
        assert not found.prune.removes


def test_then_as_little_structure_goes_as_does(folder: Path) -> None:
    lowest = (f"decompose.budget={LEAST_BITS}bits", "prune.align=32")
    limit = training(folder, *lowest, "prune.ratio=0.4") + 1
    found = configured(folder, "prune.align=32", f"train_budget={limit}B")
    assert found.decompose.budget == f"{LEAST_BITS}bits"
    assert found.prune.ratio is not None
    assert 0.3 < found.prune.ratio <= 0.4
    less = f"prune.ratio={found.prune.ratio - 0.001}"
    assert training(folder, *lowest, f"prune.ratio={found.prune.ratio}") <= limit < training(folder, *lowest, less)


def test_fewer_bits_than_that_are_kept_if_they_were_asked_for(folder: Path) -> None:
    few = "decompose.budget=2.6bits"
    limit = training(folder, few) - 1
    found = configured(folder, few, f"train_budget={limit}B")
    assert found.decompose.budget == "2.6bits"
    assert found.prune.ratio


def test_what_goes_already_is_not_less(folder: Path) -> None:
    gone = ("prune.ratio=0.5", "prune.align=32", f"decompose.budget={LEAST_BITS}bits")
    found = configured(folder, *gone, f"train_budget={training(folder, *gone) - 1}B")
    assert found.prune.ratio is not None
    assert found.prune.ratio > 0.5


def test_a_ratio_takes_the_place_of_nominal_ones(folder: Path) -> None:
    nominal = ("prune.kv_ratio=0.5", "prune.align=32", f"decompose.budget={LEAST_BITS}bits")
    found = configured(folder, *nominal, f"train_budget={training(folder, *nominal) - 1}B").prune
    assert found.ratio
    assert (found.kv_ratio, found.ffn_ratio) == (0, 0)


def test_what_the_solver_may_spend_is_within_it(folder: Path) -> None:
    """Few configurations, far apart: an even share of the budget affords the small one, all of it some large ones."""
    far = ("decompose.bits=[4, 8]", "decompose.block_sizes=[32]", "decompose.ranks=[0]", "decompose.budget=12bits")
    limit = training(folder, *far, "decompose.budget=6bits")
    config = load(folder / "tiny.yaml", (*OFFERED, *far, f"train_budget={limit}B"))
    known = know(config)
    room, spent = linear_budget(known.architecture, known.dtypes, known.config), dict(known.allocation)
    for name, sizes in choice_bytes(known.architecture, known.config).items():
        dearer = spent | {name: max(sizes, key=sizes.__getitem__)}
        if layouts.linear_bytes(replace(known, allocation=dearer).decomposed(), known.architecture) <= room:
            spent = dearer
    assert spent != known.allocation
    final = known.with_allocation(spent)
    assert max(peak_bytes(stage, final)[0] for stage in ("align", "train")) <= limit
    check_memory(plan_known(final), final.config)
    less = final.config.model_copy(update={"train_budget": f"{limit - 20_000}B"})
    with pytest.raises(
        PlanError, match=rf"training takes .* allows {limit - 20_000}B: .*below {less.decompose.budget}"
    ):
        check_memory(plan_known(final), less)


def test_what_was_found_is_found_again(folder: Path) -> None:
    limit = training(folder, f"decompose.budget={LEAST_BITS}bits", "prune.ratio=0.4")
    found = configured(folder, f"train_budget={limit}B")
    values = (f"decompose.budget={found.decompose.budget}", f"prune.ratio={found.prune.ratio}")
    assert configured(folder, *values, f"train_budget={limit}B") == found


@pytest.mark.parametrize("fixed", [(), ("prune.rounding=loram", "prune.kv_ratio=0.5", "prune.ffn_ratio=0.5")])
def test_a_budget_below_all_says_what_training_takes(folder: Path, fixed: tuple[str, ...]) -> None:
    told = f"with decompose.budget {LEAST_BITS}bits and {'no prune.ratio' if fixed else 'prune.ratio 0.'}"
    with pytest.raises(BudgetError, match=rf"training takes [0-9.]+ MB at the least, {told}"):
        configured(folder, *fixed, "train_budget=100MB")


def test_refusals_say_what_to_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 24GB"):
        configured(folder, "train_budget=20 gigabytes")
    with pytest.raises(ConfigError, match=r"set train\.base to packed, or leave train_budget out"):
        configured(folder, "train_budget=20GB", "train.base=original")


def test_plan_and_run_say_what_was_found(folder: Path) -> None:
    limit = training(folder, f"decompose.budget={LEAST_BITS}bits", "prune.ratio=0.4")
    config = load(folder / "tiny.yaml", (*OFFERED, f"train_budget={limit}B"))
    found = know(config).config
    plan = make_plan(config)
    expected = f"train_budget {limit}B: decompose.budget {LEAST_BITS}bits and prune.ratio {found.prune.ratio}"
    assert plan.settled == expected
    assert expected in render_plan(plan)
    assert next(stage for stage in plan.stages if stage.name == "train").host_peak <= limit
    compile_model(config, Reporter(), until="source")
    # It is read on other machines too, where nothing is to be found anew.
    assert load(folder / "run/config.yaml", ()) == found.model_copy(update={"train_budget": None})

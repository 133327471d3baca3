import re
from itertools import product
from typing import Any

import pytest

from prune.groups import ROLES
from qlora_pipe.architectures import Architecture, from_config, linear_name
from qlora_pipe.budget import require_feasible, smallest_allocation
from qlora_pipe.config import Config
from qlora_pipe.errors import BudgetError
from qlora_pipe.known import allowed, choice_bytes, fixed_bytes
from quant.storage import Choice

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}


@pytest.fixture
def tiny() -> Architecture:
    return from_config(TINY)


def configure(**decompose: Any) -> Config:
    offered = {"bits": (2, 3, 4), "block_sizes": (16, 32), "ranks": (0, 4), "budget": "9bits"}
    data = {"calibration": "a.txt", "task": "b.txt"}
    return Config.model_validate({"model": "owner/name", "data": data, "decompose": offered | decompose})


def refusal(tiny: Architecture, **decompose: Any) -> str:
    with pytest.raises(BudgetError) as caught:
        require_feasible(tiny, {}, configure(**decompose))
    return str(caught.value)


def smallest_that_works(text: str) -> str:
    found = re.search(r"The smallest that works is ([0-9.]+) (bits|bytes)", text)
    assert found is not None
    return found[1] + {"bits": "bits", "bytes": "B"}[found[2]]


RULES: list[tuple[dict[str, Any], ...]] = [
    (),
    ({"min_bits": 4},),
    ({"layers": (0,), "roles": ("k",), "rank": 4}, {"roles": ("o",), "block_size": 16}),
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("budget", ["1bits", "10KB", "80KB"])
def test_the_smallest_that_works_works_and_nothing_less(tiny: Architecture, rules: Any, budget: str) -> None:
    works = smallest_that_works(refusal(tiny, budget=budget, rules=rules))
    require_feasible(tiny, {}, configure(budget=works, rules=rules))
    number, unit = re.fullmatch(r"([0-9.]+)(\w+)", works).groups()  # type: ignore[union-attr]
    less = f"{float(number) - 0.0002:.4f}bits" if unit == "bits" else f"{int(number) - 1}B"
    assert smallest_that_works(refusal(tiny, budget=less, rules=rules)) == works


def test_the_smallest_allocation_keeps_ties(tiny: Architecture) -> None:
    """Against all assignments of one layer's attention, whose members are best off with different choices."""
    config = configure(bits=(2, 3), ranks=(0,), rules=({"roles": ("q",), "min_bits": 3},))
    found = smallest_allocation(tiny, config)
    sizes, groups = choice_bytes(tiny, config), allowed(tiny, config).ties
    names = [linear_name(0, role) for role in "qkvo"]
    valid = [
        sum(sizes[name][choice] for name, choice in zip(names, taken, strict=True))
        for taken in product(*(sizes[name] for name in names))
        if len(set(taken[:3])) == 1
    ]
    assert groups[0] == tuple(names[:3])
    assert sum(found[name][1] for name in names) == min(valid)
    assert {found[name][0].bits for name in names} == {2, 3}
    assert set(found) == {name for _, _, name in tiny.linears()}


def test_what_is_cheapest_for_one_member_need_not_be_for_all(
    tiny: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = Choice("nf", 2, 16, 4), Choice("nf", 3, 32, 0)
    sizes = {name: {narrow: 10, wide: 11} | ({narrow: 13} if role == "v" else {}) for _, role, name in tiny.linears()}
    monkeypatch.setattr("qlora_pipe.budget.choice_bytes", lambda *_: sizes)
    found = smallest_allocation(tiny, configure())
    assert [found[linear_name(0, role)] for role in "qkvo"] == [(narrow, 10), (narrow, 10), (narrow, 13), (narrow, 10)]
    sizes |= {linear_name(0, "v"): {narrow: 14, wide: 11}}
    found = smallest_allocation(tiny, configure())
    assert [found[linear_name(0, role)] for role in "qkvo"] == [(wide, 11), (wide, 11), (wide, 11), (narrow, 10)]


def test_what_sets_the_minimum_is_named(tiny: Architecture) -> None:
    text = refusal(tiny, budget="2bits", rules=({"layers": (1,), "roles": ("down", "o"), "bits": 4},))
    largest = [(linear_name(1, "down"), 4)] + [(linear_name(n, r), 2) for n, r in ((0, "gate"), (0, "up"), (1, "gate"))]
    places = [text.index(f"{name} ") for name, _ in largest]
    assert places == sorted(places)
    for name, bits in largest:
        assert re.search(rf"{re.escape(name)} \d+ \(lloyd{bits}-b32-r0-Lint8\)", text)
    listed = text.partition("in bytes: ")[2].partition(". Rules")[0]
    assert listed.count("(lloyd") == 5
    assert "leaves 24576 bytes" in text  # 2 bits x 98,304 weights


def test_rules_that_raise_the_minimum_are_named(tiny: Architecture) -> None:
    rules = ({"layers": (0,), "min_bits": 3}, {"max_bits": 4}, {"roles": ("v",), "min_bits": 3})
    text = refusal(tiny, budget="2bits", rules=rules)

    def least(*chosen: dict[str, Any]) -> int:
        return sum(size for _, size in smallest_allocation(tiny, configure(rules=chosen)).values())

    assert f"Rules raise it from {least()} to {least(*rules)} bytes" in text
    assert f"decompose.rules.0 {{layers: [0], min_bits: 3}} alone by {least(rules[0]) - least()}" in text
    assert f"decompose.rules.2 {{roles: [v], min_bits: 3}} alone by {least(rules[2]) - least()}" in text
    assert "rules.1" not in text
    assert "relax the rules" in text
    assert "ules" not in refusal(tiny, budget="2bits", rules=rules[1:2]).partition("Its largest")[2]


def test_a_byte_budget_tells_what_is_fixed(tiny: Architecture) -> None:
    fixed = fixed_bytes(tiny, {}, configure())
    text = refusal(tiny, budget=f"{fixed}B")
    assert "leaves 0 bytes for the linear maps" in text
    assert f"embeddings, norms, head and file header alone take {fixed} bytes" in text
    minimum = sum(size for _, size in smallest_allocation(tiny, configure()).values())
    assert smallest_that_works(text) == f"{fixed + minimum}B"


def test_sizes_are_those_of_what_the_rules_leave(tiny: Architecture) -> None:
    sizes = choice_bytes(tiny, configure(rules=({"max_bits": 2, "rank": 0},)))
    assert {(choice.bits, choice.rank) for row in sizes.values() for choice in row} == {(2, 0)}
    assert len(sizes) == 2 * len(ROLES)

from itertools import permutations
from typing import Any

import pytest

from prune.groups import ROLES
from qlora_pipe.architectures import linear_name, place_of
from qlora_pipe.config_rules import Rule, Tie
from qlora_pipe.errors import ConfigError
from qlora_pipe.rules import Narrowed, allows, narrow, tie_groups
from quant.storage import Choice

LAYERS = 3
NAMES = [linear_name(layer, role) for layer in range(LAYERS) for role in ROLES]
CHOICES = [Choice("nf", bits, block, rank) for bits in (2, 3, 4) for block in (32, 64) for rank in (0, 16)]


def narrowed(*rules: dict[str, Any], ties: tuple[Tie, ...] = (), **special: list[Choice]) -> Narrowed:
    """What is left of CHOICES; `special` roles are offered something else."""
    offered = {name: special.get(place_of(name)[1], CHOICES) for name in NAMES}
    return narrow(offered, [Rule(**rule) for rule in rules], ties)


def touched(found: Narrowed) -> set[tuple[int, str]]:
    """(layer, role) of the matrices that may not take everything."""
    return {place_of(name) for name, left in found.choices.items() if len(left) < len(CHOICES)}


def test_without_rules_all_is_left() -> None:
    found = narrowed()
    assert set(found.choices.values()) == {tuple(CHOICES)}
    assert (list(found.choices), found.ties, found.matched) == (NAMES, (), ())


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"layers": (0,), "roles": ("down",)}, {(0, "down")}),
        ({"layers": (-1, 0), "roles": ("q", "o")}, {(layer, role) for layer in (0, 2) for role in "qo"}),
        ({"layers": (-3,)}, {(0, role) for role in ROLES}),
        ({"roles": ("v",)}, {(layer, "v") for layer in range(LAYERS)}),
        ({"name": "model.layers.*.self_attn.o_proj"}, {(layer, "o") for layer in range(LAYERS)}),
        ({"name": "*.mlp.*", "layers": (1,)}, {(1, role) for role in ("gate", "up", "down")}),
        ({"name": "model.layers.1.mlp.u?_proj"}, {(1, "up")}),
    ],
)
def test_who_a_rule_is_for(selector: dict[str, Any], expected: set[tuple[int, str]]) -> None:
    found = narrowed({**selector, "min_bits": 4})
    assert touched(found) == expected
    assert found.matched == (tuple(name for name in NAMES if place_of(name) in expected),)


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"min_bits": 3}, [c for c in CHOICES if c.bits in (3, 4)]),
        ({"max_bits": 3}, [c for c in CHOICES if c.bits in (2, 3)]),
        ({"min_bits": 3, "max_bits": 3}, [c for c in CHOICES if c.bits == 3]),
        ({"bits": 4}, [c for c in CHOICES if c.bits == 4]),
        ({"block_size": 64}, [c for c in CHOICES if c.block_size == 64]),
        ({"rank": 0}, [c for c in CHOICES if c.rank == 0]),
        ({"bits": 2, "block_size": 32, "rank": 16}, [Choice("nf", 2, 32, 16)]),
    ],
)
def test_what_a_rule_leaves(constraint: dict[str, int], expected: list[Choice]) -> None:
    assert set(narrowed(constraint).choices.values()) == {tuple(expected)}
    assert [choice for choice in CHOICES if allows(Rule(**constraint), choice)] == expected


def test_several_rules_hold_together() -> None:
    found = narrowed({"min_bits": 3}, {"roles": ("q",), "max_bits": 3, "rank": 0})
    assert found.choices[NAMES[0]] == (Choice("nf", 3, 32, 0), Choice("nf", 3, 64, 0))
    assert {choice.bits for choice in found.choices[NAMES[1]]} == {3, 4}


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{"layers": (3,), "bits": 2}], ["decompose.rules.0 {layers: [3], bits: 2}", "no layer 3, the model has 3"]),
        ([{"layers": (0, -4), "bits": 2}], ["no layer -4"]),
        ([{"bits": 2}, {"name": "*.x", "bits": 2}], ["decompose.rules.1 {name: '*.x', bits: 2} is for no matrix"]),
        ([{"roles": ("q",), "name": "*.mlp.*", "bits": 2}], ["is for no matrix"]),
        ([{"roles": ("o",), "bits": 8}], ["decompose.rules.0", f"leaves {NAMES[3]} without", "bits 2/3/4"]),
        ([{"min_bits": 4, "max_bits": 3}], [f"leaves {NAMES[0]} without"]),
        (
            [{"min_bits": 3}, {"roles": ("k",), "rank": 0}, {"roles": ("q",), "max_bits": 2}],
            [
                "decompose.rules.2",
                f"leaves {NAMES[0]} without",
                "rank 0/16 after decompose.rules.0; relax",
            ],
        ),
    ],
)
def test_rules_that_cannot_hold(rules: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        narrowed(*rules)
    assert [word for word in words if word not in str(caught.value)] == []


def test_roles_are_tied_in_every_layer() -> None:
    expected = [
        tuple(linear_name(layer, role) for role in roles) for layer in range(3) for roles in ("qkv", ["gate", "up"])
    ]
    assert list(tie_groups(NAMES, (("q", "k", "v"), ("gate", "up")))) == expected


def test_a_pattern_ties_across_layers() -> None:
    assert tie_groups(NAMES, ("model.layers.*.self_attn.o_proj",)) == (
        tuple(linear_name(n, "o") for n in range(LAYERS)),
    )
    assert tie_groups(NAMES, ("model.layers.1.mlp.*",)) == (tuple(NAMES[11:14]),)


def test_one_or_none_is_no_group() -> None:
    assert tie_groups(NAMES, (("q",), (), NAMES[3])) == ()


@pytest.mark.parametrize("ties", list(permutations([("q", "k"), ("k", "v"), "*.v_proj", ("gate", "up")])))
def test_ties_that_share_a_matrix_merge(ties: tuple[Tie, ...]) -> None:
    """Transitively, whatever their order: q-k-v of all layers become one group."""
    merged = tuple(linear_name(layer, role) for layer in range(LAYERS) for role in "qkv")
    pairs = {tuple(linear_name(layer, role) for role in ("gate", "up")) for layer in range(LAYERS)}
    assert set(tie_groups(NAMES, ties)) == {merged, *pairs}


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"decompose\.ties\.1: no matrix is called 'x\*'"):
        narrowed(ties=(("q", "k"), "x*"))


def test_tied_matrices_may_take_what_all_of_them_can() -> None:
    few = [Choice("nf", 4, 64, 16), Choice("nf", 4, 32, 0), Choice("nf", 3, 128, 0), Choice("nf", 2, 32, 0)]
    found = narrowed({"roles": ("q",), "min_bits": 3}, ties=(("q", "k", "v"),), k=few)
    # The order is that of the group's first member, for all of them.
    assert {found.choices[name] for name in NAMES[:3]} == {(Choice("nf", 4, 32, 0), Choice("nf", 4, 64, 16))}
    assert found.choices[NAMES[3]] == tuple(CHOICES)


def test_a_floor_on_one_member_binds_the_group() -> None:
    found = narrowed({"layers": (2,), "min_bits": 4}, ties=("*.down_proj",))
    assert {choice.bits for layer in range(LAYERS) for choice in found.choices[linear_name(layer, "down")]} == {4}


def test_ties_that_cannot_hold_for_the_shapes() -> None:
    with pytest.raises(ConfigError, match="have no configuration in common") as caught:
        narrowed(ties=("*.self_attn.*",), o=[Choice("nf", 2, 16, 0)])
    text = str(caught.value)
    assert "and 8 more" in text
    assert (
        f"{NAMES[0]} may take bits 2/3/4, block_size 32/64, rank 0/16; {NAMES[3]} may take bits 2, block_size 16"
        in text
    )
    assert "decompose.rules" not in text


def test_ties_that_cannot_hold_for_the_rules() -> None:
    with pytest.raises(ConfigError, match="have no configuration in common") as caught:
        narrowed({"min_bits": 2}, {"roles": ("q",), "bits": 2}, {"roles": ("k",), "bits": 3}, ties=(("q", "k"),))
    text = str(caught.value)
    assert f"{NAMES[0]} may take bits 2, block_size 32/64, rank 0/16 (decompose.rules.0, decompose.rules.1)" in text
    assert f"{NAMES[1]} may take bits 3, block_size 32/64, rank 0/16 (decompose.rules.0, decompose.rules.2)" in text

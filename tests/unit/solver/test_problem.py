"""What a problem accepts, what it refuses, and that each refusal names its item and choice."""

import math

import pytest

from solver import Choice, InvalidProblem, Item, Problem

TWO = (Choice("a", 1, 2.0), Choice("b", 2, 1.0))
THREE = (*TWO, Choice("c", 3, 0.0))


def instance(**changes):
    choices = [{"name": "a", "cost": 1, "loss": 2.0}, {"name": "b", "cost": 2, "loss": 1.0}]
    data = {"budget": 4, "items": [{"name": "q", "choices": choices}, {"name": "k", "choices": choices}]}
    return data | changes


def test_reads_the_json_form():
    problem = Problem.from_dict(instance(ties=[["q", "k"]], fixed={"k": "b"}))
    assert problem == Problem(4, (Item("q", TWO), Item("k", TWO)), (("q", "k"),), {"k": "b"})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "the problem must be an object"),
        ({"items": []}, r"missing keys \['budget'\]"),
        (instance(buget=3), r"unknown keys \['buget'\]"),
        (instance(items=3), "items must be an array"),
        (instance(items=[]), "no items"),
        (
            instance(items=[{"name": "q", "choices": [{"name": "a", "cost": 1}]}]),
            r"'q'.*missing keys \['loss'\]",
        ),
        (instance(items=[{"name": 7, "choices": []}]), "name of item 0"),
        (instance(ties=["qk"]), "each tie must be an array"),
        (instance(fixed=["q"]), "fixed must be an object"),
        (instance(budget=4.0), "budget must be an integer"),
        (instance(budget=True), "budget must be an integer"),
    ],
)
def test_refuses_a_malformed_document(data, reason):
    with pytest.raises(InvalidProblem, match=reason):
        Problem.from_dict(data)


@pytest.mark.parametrize("cost", [-1, 1.0, "1", True, math.nan, None])
def test_refuses_a_cost_that_is_not_a_natural_number(cost):
    with pytest.raises(InvalidProblem, match=r"cost of choice 'bad' of item 'q'"):
        Problem(9, (Item("k", TWO), Item("q", (*TWO, Choice("bad", cost, 0.0)))))


@pytest.mark.parametrize("loss", [-1.0, math.nan, math.inf, -math.inf, "1", True, None, 10**400])
def test_refuses_a_loss_that_is_not_finite_and_positive(loss):
    with pytest.raises(InvalidProblem, match=r"loss of choice 'bad' of item 'q'"):
        Problem(9, (Item("k", TWO), Item("q", (*TWO, Choice("bad", 0, loss)))))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((9, (Item("q", ()),)), "'q' has no choice"),
        ((9, (Item("q", TWO), Item("q", TWO))), "'q' appears twice"),
        ((9, (Item("q", (TWO[0], TWO[0])),)), "'q' has two choices of the same name"),
        ((9, (Item("q", TWO), Item("k", THREE)), (("q", "k"),)), "'q' has 2, 'k' has 3"),
        ((9, (Item("q", TWO),), (("q", "z"),)), "unknown item 'z'"),
        ((9, (Item("q", TWO),), ((),)), "no items"),
        ((9, (Item("q", TWO),), (), {"z": "a"}), "unknown item 'z'"),
        ((9, (Item("q", TWO),), (), {"q": "z"}), "unknown choice 'z' of item 'q'"),
        (
            (9, (Item("q", TWO), Item("k", TWO)), (("q", "k"),), {"q": "a", "k": "b"}),
            "'q' to 'a', 'k' to 'b'",
        ),
        ((9, (Item("q", (Choice("a", 2**62, 0.0),)),)), "a cost of 4611686018427387904 is over"),
        ((9, tuple(Item(n, (TWO[1], Choice("a", 2**61, 0.0))) for n in "qk")), "total cost can reach"),
        ((9, tuple(Item(n, (TWO[1], Choice("a", 1, 1.5e308))) for n in "qk")), "total loss overflows"),
    ],
)
def test_refuses_a_contradiction(arguments, reason):
    with pytest.raises(InvalidProblem, match=reason):
        Problem(*arguments)


def test_ties_that_share_an_item_merge_and_groups_keep_item_order():
    items = tuple(Item(name, TWO) for name in "abcdef")
    problem = Problem(9, items, (("e", "c"), ("b", "c"), ("f",)))
    assert problem.groups() == ((0,), (1, 2, 4), (3,), (5,))


def test_agreeing_fixed_choices_within_a_tie_are_accepted():
    problem = Problem(9, (Item("q", TWO), Item("k", TWO)), (("q", "k"),), {"q": "a", "k": "a"})
    assert problem.fixed == {"q": "a", "k": "a"}


def test_numbers_are_gathered_once_in_item_order_and_cannot_be_changed():
    problem = Problem(9, (Item("q", THREE), Item("k", (Choice("a", 7, 5),))))
    assert problem.costs.tolist() == [1, 2, 3, 7]
    assert problem.losses.tolist() == [2.0, 1.0, 0.0, 5.0]
    with pytest.raises(ValueError, match="read-only"):
        problem.costs[0] = 0

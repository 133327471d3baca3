from dataclasses import replace

import pytest
import torch

from quant.decompose import decompose
from quant.errors import error_table
from quant.exceptions import QuantError, ShapeError
from quant.lowrank import svd_lowrank
from quant.storage import Choice

CHOICES = [Choice("nf", bits, 32, rank) for bits in (2, 3, 4) for rank in (0, 4, 12)]


def _weight():
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_entries_are_those_of_decompose_with_the_shared_first_fit(iterations, weighted):
    weight = _weight()
    weights = {}
    if weighted:
        generator = torch.Generator().manual_seed(1)
        weights = {
            "row_weight": torch.rand(64, generator=generator) + 0.1,
            "column_weight": torch.rand(96, generator=generator) + 0.1,
        }
    table = error_table(weight, CHOICES, generator_seed=7, iterations=iterations, **weights)
    left, right = svd_lowrank(weight, 12, generator=torch.Generator().manual_seed(7), **weights)
    for choice, loss in zip(CHOICES, table, strict=True):
        expected = decompose(
            weight,
            choice,
            generator=torch.Generator().manual_seed(7),
            max_iterations=iterations,
            patience=iterations,
            first=(left[:, : choice.rank], right[: choice.rank]),
            **weights,
        )
        assert loss == expected.loss


def test_the_first_fit_is_computed_once(monkeypatch):
    calls = []

    def counted(*arguments, **keywords):
        calls.append(arguments[1])
        return svd_lowrank(*arguments, **keywords)

    monkeypatch.setattr("quant.errors.svd_lowrank", counted)
    monkeypatch.setattr("quant.decompose.svd_lowrank", counted)
    error_table(_weight(), CHOICES, generator_seed=0)
    assert calls == [12]


def test_more_bits_and_more_rank_cost_less_error():
    table = dict(
        zip(
            ((choice.bits, choice.rank) for choice in CHOICES),
            error_table(_weight(), CHOICES, generator_seed=0),
            strict=True,
        )
    )
    assert table[2, 0] > table[3, 0] > table[4, 0]
    assert table[3, 0] > table[3, 4] > table[3, 12]


def test_order_of_choices_does_not_matter():
    forward = error_table(_weight(), CHOICES, generator_seed=0, iterations=2)
    backward = error_table(_weight(), CHOICES[::-1], generator_seed=0, iterations=2)
    assert forward == backward[::-1]


def test_more_iterations_never_cost_more():
    one = error_table(_weight(), CHOICES, generator_seed=0)
    five = error_table(_weight(), CHOICES, generator_seed=0, iterations=5)
    assert all(later <= first for first, later in zip(one, five, strict=True))
    assert five != one


@pytest.mark.parametrize(("field", "value"), [("factor_dtype", "int8"), ("grid", "lloyd"), ("scale_bits", 4)])
def test_every_field_of_a_choice_counts(field, value):
    others = [replace(choice, **{field: value}) for choice in CHOICES]
    assert error_table(_weight(), others, generator_seed=0) != error_table(_weight(), CHOICES, generator_seed=0)


def test_edges():
    assert error_table(_weight(), [], generator_seed=0) == []
    with pytest.raises(QuantError, match="iterations"):
        error_table(_weight(), CHOICES, generator_seed=0, iterations=0)
    with pytest.raises(ShapeError, match="rank 65"):
        error_table(_weight(), [Choice("nf", 4, 32, 65)], generator_seed=0)

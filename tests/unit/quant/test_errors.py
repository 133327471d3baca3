import pytest
import torch

from quant.blockwise import BlockFormat
from quant.decompose import decompose
from quant.errors import error_table
from quant.exceptions import QuantError, ShapeError
from quant.lowrank import svd_lowrank

CHOICES = [(BlockFormat(bits, 32), rank) for bits in (2, 3, 4) for rank in (0, 4, 12)]


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
    for (fmt, rank), loss in zip(CHOICES, table, strict=True):
        expected = decompose(
            weight,
            fmt,
            rank,
            generator=torch.Generator().manual_seed(7),
            max_iterations=iterations,
            patience=iterations,
            first=(left[:, :rank], right[:rank]),
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
            ((fmt.bits, rank) for fmt, rank in CHOICES),
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


def test_factor_dtype_is_passed_on():
    exact = error_table(_weight(), CHOICES, generator_seed=0, factor_dtype=torch.float32)
    assert exact != error_table(_weight(), CHOICES, generator_seed=0)


def test_edges():
    assert error_table(_weight(), [], generator_seed=0) == []
    with pytest.raises(QuantError, match="iterations"):
        error_table(_weight(), CHOICES, generator_seed=0, iterations=0)
    with pytest.raises(ShapeError, match="rank 65"):
        error_table(_weight(), [(BlockFormat(4, 32), 65)], generator_seed=0)

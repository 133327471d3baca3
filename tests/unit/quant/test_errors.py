import math
import statistics
from dataclasses import replace

import pytest
import torch

from quant.decompose import decompose
from quant.errors import error_table, full_table, sample_outputs
from quant.exceptions import QuantError, ShapeError
from quant.metric import Metric
from quant.rounding import feedback
from quant.storage import Choice

CHOICES = [Choice("nf", bits, 32, rank) for bits in (2, 3, 4) for rank in (0, 4, 12)]
PLAIN = [choice for choice in CHOICES if not choice.rank]
BOTH = pytest.mark.parametrize("transposed", [False, True])


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _weight(rows=64, columns=96):
    return torch.randn(rows, columns, generator=_generator())


def _covariance(size=96, tokens=300):
    mixed = torch.randn(tokens, size, generator=_generator(1)) @ torch.randn(size, size, generator=_generator(2))
    return mixed.T @ mixed / tokens


def _metric(kind, rows=64, columns=96):
    outputs = torch.rand(rows, generator=_generator(3)) + 0.1
    if kind == "covariance":
        return Metric(outputs, covariance=_covariance(columns))
    return Metric(outputs, torch.rand(columns, generator=_generator(4)) + 0.1) if kind == "fisher" else Metric()


def _table(choices=CHOICES, seed=0, **settings):
    return [entry.loss for entry in error_table(_weight(), choices, generator=_generator(seed), **settings)]


@BOTH
@pytest.mark.parametrize("kind", ["none", "fisher", "covariance"])
def test_without_sampling_and_rank_an_entry_is_the_loss(kind, transposed):
    """1e-5: the order of float64 sums of fp32 products."""
    settings = {"metric": _metric(kind), "transposed": transposed}
    full = full_table(_weight(), PLAIN, generator_seed=0, **settings)
    assert _table(PLAIN, **settings) == pytest.approx(full, rel=1e-5)


@BOTH
def test_the_first_iteration_of_every_rank_is_estimated_from_one_fit(transposed, monkeypatch):
    fits, fit = [], Metric.fit

    def counted(self, matrix, rank, generator):
        fits.append(rank)
        return fit(self, matrix, rank, generator)

    metric = _metric("covariance")
    expected = []
    for choice in CHOICES:
        left, right = metric.fit(_weight(), 12, _generator(7))
        first = left[:, : choice.rank], right[: choice.rank]
        made = decompose(
            _weight(),
            choice,
            generator=_generator(),
            metric=metric,
            transposed=transposed,
            max_iterations=1,
            first=first,
        )
        expected.append(made.loss)
    monkeypatch.setattr(Metric, "fit", counted)
    assert _table(seed=7, metric=metric, transposed=transposed) == pytest.approx(expected, rel=1e-5)
    assert fits == [12]


LLOYD = [Choice("lloyd", bits, block, rank) for bits in (2, 4) for block in (16, 32) for rank in (0, 4, 8, 16)]


def _compensated(transposed, iterations):
    """Whole and estimated tables of a weight that has some structure."""
    weight = _weight(128, 192) + _weight(128, 3) @ _weight(3, 192) / 2
    metric = Metric(_metric("covariance", 128).outputs, covariance=_covariance(192, 600))
    passing = {block: feedback(metric.covariance, block, 0.03) for block in (16, 32, None)}
    settings = {"metric": metric, "passing": passing, "transposed": transposed, "max_iterations": iterations}
    entries = error_table(weight, LLOYD, generator=_generator(), **settings)
    return full_table(weight, LLOYD, generator_seed=0, **settings), [entry.loss for entry in entries]


def _off(expected, found):
    return [abs(math.log(a / b)) for a, b in zip(expected, found, strict=True)]


@BOTH
@pytest.mark.parametrize(("iterations", "most", "mean"), [(1, 0.07, 0.03), (4, 0.11, 0.04), (8, 0.17, 0.06)])
def test_compensated_rounding_and_alternation_are_estimated_without_doing_them(iterations, most, mean, transposed):
    """Within 7 to 17 % of what the whole decomposition loses, 3 to 6 % in the mean, where entries differ twentyfold."""
    expected, found = _compensated(transposed, iterations)
    assert max(expected) > 20 * min(expected)
    assert max(_off(expected, found)) < most
    assert statistics.fmean(_off(expected, found)) < mean


@BOTH
@pytest.mark.parametrize(
    ("iterations", "part", "without"),
    [
        (8, "quant.errors._SHRINKS", 1e-9),
        (8, "quant.errors._anchored", lambda *_: []),
        (1, "quant.rounding.Chain.growth", lambda _, energy, __: torch.ones_like(energy)),
    ],
    ids=["gain of later iterations", "whole decompositions", "growth of errors"],
)
def test_every_part_of_the_estimate_is_needed(iterations, part, without, transposed, monkeypatch):
    off = statistics.fmean(_off(*_compensated(transposed, iterations)))
    monkeypatch.setattr(part, without)
    assert statistics.fmean(_off(*_compensated(transposed, iterations))) > 1.5 * off


@BOTH
@pytest.mark.parametrize("quantize_first", [False, True])
@pytest.mark.parametrize("iterations", [1, 2])
def test_an_entry_that_others_are_scaled_to_is_a_whole_decomposition(iterations, quantize_first, transposed):
    """The fewest bits and the middle of the block sizes. 5 % if the loop draws other random probes than the table."""
    choices = [Choice("lloyd", bits, block, rank) for bits in (2, 3) for block in (8, 16, 32) for rank in (0, 12)]
    metric = _metric("covariance")
    passing = {block: feedback(metric.covariance, block) for block in (8, 16, 32, None)}
    settings = {"metric": metric, "passing": passing, "transposed": transposed}
    settings |= {"max_iterations": iterations, "quantize_first": quantize_first}
    whole = [Choice("lloyd", 2, 16, rank) for rank in (0, 12)]
    expected = full_table(_weight(), whole, generator_seed=0, patience=9, **settings)
    found = dict(zip(choices, _table(choices, **settings), strict=True))
    assert [found[choice] for choice in whole] == pytest.approx(expected, rel=0.05 if quantize_first else 1e-5)


def test_a_full_table_is_that_of_decompose():
    metric = _metric("covariance")
    passing = {32: feedback(metric.covariance, 32)}
    table = full_table(
        _weight(), CHOICES, generator_seed=7, metric=metric, passing=passing, max_iterations=3, patience=None
    )
    for choice, loss in zip(CHOICES, table, strict=True):
        expected = decompose(
            _weight(),
            choice,
            generator=_generator(7),
            metric=metric,
            passing=passing[32],
            max_iterations=3,
            patience=None,
        )
        assert loss == expected.loss


def test_more_bits_and_more_rank_cost_less_error():
    table = dict(zip(((choice.bits, choice.rank) for choice in CHOICES), _table(), strict=True))
    assert table[2, 0] > table[3, 0] > table[4, 0]
    assert table[3, 0] > table[3, 4] > table[3, 12]


def test_order_of_choices_does_not_matter():
    assert _table(outputs=24) == _table(CHOICES[::-1], outputs=24)[::-1]


@pytest.mark.parametrize(("field", "value"), [("factor_dtype", "int8"), ("grid", "lloyd"), ("scale_bits", 4)])
def test_every_field_of_a_choice_counts(field, value):
    assert _table([replace(choice, **{field: value}) for choice in CHOICES]) != _table()


# Sampled outputs -------------------------------------------------------------------------------------------


@BOTH
def test_a_sample_is_right_on_average(transposed):
    """Over 200 seeds the mean is within four of its standard errors; it varies as much as each draw says it does."""
    weight, metric = _weight(192, 64), _metric("fisher", 192, 64)
    choice = Choice("nf", 3, 16, 0, 32, "float32")
    settings = {"metric": metric, "transposed": transposed}
    (exact,) = error_table(weight, [choice], generator=_generator(), **settings)
    assert exact.error == 0
    entries = [
        error_table(weight, [choice], generator=_generator(seed), outputs=64, **settings)[0] for seed in range(200)
    ]
    found = [entry.loss for entry in entries]
    spread = statistics.stdev(found)
    error = spread / len(found) ** 0.5
    assert 0 < error < 0.02 * exact.loss
    assert abs(statistics.fmean(found) - exact.loss) < 4 * error
    # The spread of 200 draws is known to 5 %, the mean of their own estimates better.
    assert statistics.fmean(entry.error**2 for entry in entries) ** 0.5 == pytest.approx(spread, rel=0.2)


def test_one_drawn_strip_says_nothing_of_its_error():
    (entry,) = error_table(_weight(), PLAIN[:1], generator=_generator(), outputs=2)
    assert entry.error == entry.loss > 0


@pytest.mark.parametrize("strip", [1, 4])
def test_the_heaviest_outputs_are_always_in_and_stand_for_themselves(strip):
    weight = _weight()
    weight[37] *= 50
    outputs = torch.ones(64)
    outputs[11] = 400
    for seed in range(30):
        sample = sample_outputs(weight, Metric(outputs), strip, 16, _generator(seed))
        for heavy in (37, 11):
            assert sample.weight[sample.rows == heavy].tolist() == [1.0]
        assert len(sample.rows) == len(set(sample.rows.tolist())) == 16
        assert sample.weight.sum().item() == pytest.approx(64)
        for whole in sample.rows.view(-1, strip).tolist():
            assert whole == list(range(whole[0], whole[0] + strip))
            assert whole[0] % strip == 0


@pytest.mark.parametrize("count", [61, 64, 1000])
def test_all_outputs_if_they_are_as_few(count):
    sample = sample_outputs(_weight(), Metric(), 4, count, _generator())
    assert sample.rows.tolist() == list(range(64))
    assert sample.weight.unique().tolist() == [1.0]


def test_one_strip_stands_for_all():
    sample = sample_outputs(_weight(), Metric(), 16, 1, _generator())
    assert len(sample.rows) == 16
    assert sample.weight.unique().tolist() == [4.0]


@BOTH
def test_superblocks_that_a_sample_cannot_keep_whole(transposed):
    """Every row has its own in the estimate; within 2 % of the matrix's own here."""
    choice = Choice("nf", 3, 16, 0, superblock=384)
    (exact,) = _table([choice], transposed=transposed)
    (found,) = _table([choice], transposed=transposed, outputs=48)
    (alike,) = _table([replace(choice, superblock=None)], transposed=transposed, outputs=48)
    assert found == alike
    assert found == pytest.approx(exact, rel=0.1)


def test_edges():
    assert _table([]) == []
    with pytest.raises(QuantError, match="64 outputs do not split into strips of 48"):
        sample_outputs(_weight(), Metric(), 48, 10, _generator())
    with pytest.raises(ShapeError, match="rank 65"):
        _table([Choice("nf", 4, 32, 65)])
    with pytest.raises(ShapeError, match="blocks of 64"):
        _table([Choice("nf", 4, 64, 0)])

"""Against float64 twins that look at one entry after another and solve for every column anew."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from prune.exceptions import PruneError, RatioError
from prune.sparse import check_mask, inverse_root, pack_mask, sparsegpt_mask, unpack_mask, wanda_mask

OUT, IN = 12, 24
PATTERNS = [(0.55, None), (0.3, None), (0.5, 4), (0.5, 8), (0.25, 4)]
EVERY = pytest.mark.parametrize(("ratio", "group"), PATTERNS)


def matrix(rows: int = OUT, columns: int = IN, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def covariance(size: int = IN, tokens: int = 200, seed: int = 1) -> Tensor:
    """Correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(tokens, size, generator=generator) @ torch.randn(size, size, generator=generator)
    seen *= torch.linspace(0.2, 3, size)[torch.randperm(size, generator=generator)]
    return (seen.double().T @ seen.double() / tokens).float()


def rms(size: int = IN) -> Tensor:
    return covariance(size).diagonal().sqrt()


def lowest(scores: list[tuple[float, tuple[int, int]]], count: int) -> list[tuple[int, int]]:
    """Places of the lowest, the earlier of equals."""
    return [place for _, place in sorted(scores)[:count]]


def share(ratio: float, entries: int) -> int:
    return int(Fraction(str(ratio)) * entries)


def wanda_twin(weight: Tensor, inputs: Tensor, ratio: float, group: int | None) -> Tensor:
    mask, scores = torch.zeros(weight.shape, dtype=torch.bool), (weight.double() * inputs.double()).abs()
    rows, columns = weight.shape
    for row in range(rows):
        for start in range(0, columns, group or columns):
            width = group or columns
            ends = (share(ratio, columns * row), share(ratio, columns * (row + 1)))
            count = share(ratio, group) if group else ends[1] - ends[0]
            entries = [(float(scores[row, j]), (row, j)) for j in range(start, start + width)]
            for place in lowest(entries, count):
                mask[place] = True
    return mask


def sparsegpt_twin(weight: Tensor, covariance: Tensor, damping: float, ratio: float, group: int | None) -> Tensor:
    """Before each column the ones to come are those that lose least given what the ones before have lost (Optimal
    Brain Surgeon, solved for anew); an entry's score is w^2 over the first diagonal entry of the inverse from its
    column on."""
    hessian = covariance.double() + damping * covariance.double().diagonal().mean() * torch.eye(len(covariance))
    rows, columns = weight.shape
    kept, mask = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool)

    def now(column: int) -> Tensor:
        """Columns from this one on, made up for what is fixed."""
        inverse = torch.linalg.inv(hessian[column:, column:])
        return weight.double()[:, column:] + (weight.double() - kept)[:, :column] @ hessian[:column, column:] @ inverse

    for column in range(columns):
        if column % (group or 128) == 0:
            stop = min(column + (group or 128), columns)
            cost = [float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(column, stop)]
            scores = now(column)[:, : stop - column].square() / torch.tensor(cost)
            places = [(float(scores[i, j - column]), (j, i)) for i in range(rows) for j in range(column, stop)]
            if group is None:
                chosen = lowest(places, share(ratio, rows * stop) - share(ratio, rows * column))
            else:
                by_row = [[it for it in places if it[1][1] == i] for i in range(rows)]
                chosen = [place for it in by_row for place in lowest(it, share(ratio, group))]
            for j, i in chosen:
                mask[i, j] = True
        kept[:, column] = torch.where(mask[:, column], 0.0, now(column)[:, 0])
    return mask


@EVERY
def test_wanda_takes_the_lowest_of_every_row_or_group(ratio: float, group: int | None) -> None:
    found = wanda_mask(matrix(), rms(), ratio, group)
    assert torch.equal(found, wanda_twin(matrix(), rms(), ratio, group))
    check_mask(found, ratio, group)


def test_wanda_in_parts_of_rows() -> None:
    weight = matrix(600, 7)
    found = wanda_mask(weight, rms(7), 0.45)
    assert torch.equal(found, wanda_twin(weight, rms(7), 0.45, None))
    # 3.15 of 7 go: three of most rows, four of some.
    assert set(found.sum(dim=1).tolist()) == {3, 4}
    assert int(found.sum()) == 1890


@EVERY
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_sparsegpt_equals_the_column_by_column_solution(ratio: float, group: int | None, damping: float) -> None:
    found = sparsegpt_mask(matrix(), inverse_root(covariance(), damping), ratio, group)
    assert torch.equal(found, sparsegpt_twin(matrix(), covariance(), damping, ratio, group))
    check_mask(found, ratio, group)


@pytest.mark.parametrize(("ratio", "group"), [(0.55, None), (0.5, 8)])
def test_sparsegpt_over_more_columns_than_compete(ratio: float, group: int | None) -> None:
    """Later columns get the corrections of whole blocks before them, and the shares of blocks add up."""
    weight, seen = matrix(5, 280), covariance(280, 700)
    found = sparsegpt_mask(weight, inverse_root(seen, 0.01), ratio, group)
    assert torch.equal(found, sparsegpt_twin(weight, seen, 0.01, ratio, group))
    check_mask(found, ratio, group)


def test_corrections_decide_what_goes() -> None:
    """Two inputs that are nearly the same: the first to go leaves its weight to the second, which then stays."""
    seen = torch.tensor([[1.0, 0.999, 0, 0], [0.999, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    weight = torch.tensor([[1.0, 1.0, 1.5, 1.9]])
    alone = sparsegpt_mask(weight, inverse_root(seen, 1e-4), 0.5, 2)
    assert alone.tolist() == [[True, False, True, False]]
    # Unlike Wanda, which cannot tell that one of the two is as good as both.
    assert wanda_mask(weight, seen.diagonal().sqrt(), 0.5).tolist() == [[True, True, False, False]]
    assert sparsegpt_mask(weight, inverse_root(torch.eye(4), 1e-4), 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("ratio", [0.3, 0.55])
def test_uncorrelated_inputs_make_it_magnitude_times_input(ratio: float) -> None:
    sizes = rms()
    scores = (matrix() * sizes).abs().flatten()
    found = sparsegpt_mask(matrix(), inverse_root(torch.diag(sizes.square()), 0.0), ratio)
    assert set(scores.argsort()[: int(found.sum())].tolist()) == set(found.flatten().nonzero().flatten().tolist())


@pytest.mark.parametrize(("ratio", "group"), [it for it in PATTERNS if it[1]])
def test_the_error_is_below_that_of_wanda(ratio: float, group: int) -> None:
    """With the best weights that are left, under the covariance that was measured, when every group is chosen knowing
    what went before it. Where 128 columns are chosen at once, correlated inputs this strong can turn that around."""
    weight, seen = matrix(32, 64), covariance(64, 1000)
    inverse = torch.linalg.inv(seen.double())

    def loss(mask: Tensor) -> float:
        rows = zip(weight.double(), mask, strict=True)
        return sum(float(row[gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ row[gone]) for row, gone in rows)

    ours = sparsegpt_mask(weight, inverse_root(seen, 1e-6), ratio, group)
    assert loss(ours) < 0.9 * loss(wanda_mask(weight, seen.diagonal().sqrt(), ratio, group))


def test_the_root_is_of_the_damped_inverse() -> None:
    """1e-5: rounding to fp32 of a factor made in fp64."""
    seen = covariance()
    root = inverse_root(seen, 0.05).double()
    hessian = seen.double() + 0.05 * seen.double().diagonal().mean() * torch.eye(IN)
    assert torch.equal(root, root.triu())
    inverse = torch.linalg.inv(hessian)
    torch.testing.assert_close(root.T @ root, inverse, rtol=1e-5, atol=1e-5 * float(inverse.abs().max()))


def test_equal_scores_go_from_the_front() -> None:
    flat = torch.ones(2, 8)
    assert wanda_mask(flat, torch.ones(8), 0.5, 4).tolist() == [[True, True, False, False] * 2] * 2
    assert sparsegpt_mask(flat, inverse_root(torch.eye(8), 0.0), 0.5, 4).tolist() == (
        [[True, True, False, False] * 2] * 2
    )
    assert wanda_mask(flat, torch.ones(8), 0.3).sum(dim=1).tolist() == [2, 2]  # 2.4 each: 2, then 4 in all


def test_dead_inputs_go_first() -> None:
    seen = covariance()
    seen[5], seen[:, 5] = 0, 0
    weight = matrix()
    for mask in (
        wanda_mask(weight, seen.diagonal().sqrt(), 0.3),
        sparsegpt_mask(weight, inverse_root(seen, 1e-4), 0.3),  # what is added to the diagonal is all they cost
    ):
        assert bool(mask[:, 5].all())
    assert int(sparsegpt_mask(weight, inverse_root(torch.zeros(IN, IN), 0.01), 0.3).sum()) == share(0.3, OUT * IN)


def test_nothing_goes_at_zero_and_the_input_is_left_alone() -> None:
    weight, seen = matrix(), covariance()
    before = weight.clone(), seen.clone()
    root = inverse_root(seen, 0.01)
    assert not wanda_mask(weight, rms(), 0.0).any()
    assert not sparsegpt_mask(weight, root, 0.0).any()
    sparsegpt_mask(weight, root, 0.5, 4)
    sparsegpt_mask(weight[:1], root, 0.5)
    assert torch.equal(weight, before[0])
    assert torch.equal(seen, before[1])
    assert torch.equal(root, inverse_root(seen, 0.01))


def test_too_short_a_calibration() -> None:
    """Fewer tokens than inputs leave directions that nothing is known of; damping covers for them, or it is told."""
    few = covariance(IN, 6)
    assert bool(torch.isfinite(inverse_root(few, 0.01)).all())
    for tokens, damping, seed in itertools.product((1, 6, 12), (0.0, 1e-9), range(10)):
        with pytest.raises(PruneError, match=r"24 inputs is singular.*more tokens, or raise the damping"):
            inverse_root(covariance(IN, tokens, seed), damping)
    with pytest.raises(PruneError, match="singular"):
        inverse_root(-covariance(), 0.01)
    assert bool(torch.isfinite(inverse_root(covariance(), 0.0)).all())


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 24])
def test_packed_masks_come_back(columns: int) -> None:
    mask = matrix(5, columns, 3) > 0
    packed = pack_mask(mask)
    assert packed.shape == (5, -(-columns // 8))
    assert torch.equal(unpack_mask(packed, columns), mask)
    for row in range(5):
        bits = sum(int(mask[row, j]) << j for j in range(columns))
        assert int.from_bytes(bytes(packed[row].tolist()), "little") == bits


def test_bad_requests_are_refused() -> None:
    weight, root = matrix(), inverse_root(covariance(), 0.01)
    with pytest.raises(RatioError, match=r"must be in \[0, 1\), found 1"):
        wanda_mask(weight, rms(), 1.0)
    with pytest.raises(RatioError, match=r"found -0\.1"):
        sparsegpt_mask(weight, root, -0.1)
    with pytest.raises(PruneError, match=r"share of 0\.55 is no whole number of every 4"):
        sparsegpt_mask(weight, root, 0.55, 4)
    with pytest.raises(PruneError, match="24 inputs do not split into groups of 16"):
        wanda_mask(weight, rms(), 0.5, 16)
    with pytest.raises(PruneError, match="root mean square for each of 24 inputs"):
        wanda_mask(weight, rms()[:5], 0.5)
    with pytest.raises(PruneError, match="a factor for 24 inputs"):
        sparsegpt_mask(weight, root[:5], 0.5)
    with pytest.raises(PruneError, match=r"\[out, in\]"):
        wanda_mask(weight[0], rms(), 0.5)
    with pytest.raises(PruneError, match=r"covariance \[n, n\]"):
        inverse_root(root[:5], 0.01)
    with pytest.raises(PruneError, match="covariance of the inputs contains NaN"):
        inverse_root(covariance() * torch.nan, 0.01)
    weight[3, 4] = torch.inf
    for group in (None, 4):
        with pytest.raises(PruneError, match="scores of entries contain NaN or infinity"):
            wanda_mask(weight, rms(), 0.5, group)
        with pytest.raises(PruneError, match="scores of entries contain NaN or infinity"):
            sparsegpt_mask(weight, root, 0.5, group)


def test_masks_that_are_not_what_they_say() -> None:
    mask = wanda_mask(matrix(), rms(), 0.5, 4)
    with pytest.raises(PruneError, match="expected 158 of 288 entries to go, found 144"):
        check_mask(mask, 0.55)
    swapped = mask.clone()
    swapped[2, 4:8], swapped[2, 8:12] = True, False
    check_mask(swapped, 0.5)
    with pytest.raises(PruneError, match="expected 2 of every 4 inputs to go, found 4 in row 2 from input 4 on"):
        check_mask(swapped, 0.5, 4)
    packed = pack_mask(torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(PruneError, match="bits behind them"):
        unpack_mask(packed + 128, 7)
    with pytest.raises(PruneError, match="packed mask of 9 inputs"):
        unpack_mask(packed, 9)

import pytest
import torch

from prune.exceptions import PruneError
from prune.groups import ROLES, LayerShape, shape_of
from prune.members import MemberScores, channel_sums, fold, magnitudes, rows_of

SHAPE = LayerShape(hidden=4, heads=8, kv_heads=2, head_dim=3, ffn=5)


def test_sums_do_not_depend_on_the_blocks() -> None:
    matrix = torch.randint(-9, 9, (600, 7)).float()
    asked = []

    def entries(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return matrix[start:stop]

    for dim in (0, 1):
        found = channel_sums(entries, 600, dim)
        assert found.dtype == torch.float64
        assert torch.equal(found, matrix.double().sum(dim=1 - dim))
    assert asked == [(0, 256), (256, 512), (512, 600)] * 2
    with pytest.raises(PruneError, match="axes 0 and 1, found 2"):
        channel_sums(entries, 600, 2)


def test_sums_are_wide() -> None:
    # 2^24 + 1 is no fp32 number.
    column = torch.cat([torch.tensor([2.0**24]), torch.ones(3)])[:, None]
    assert channel_sums(lambda start, stop: column[start:stop], 4, 1).tolist() == [2.0**24 + 3]


def test_small_squares_do_not_vanish() -> None:
    tiny = torch.tensor([1e-30, -2e-30])
    assert magnitudes(tiny, 2).tolist() == pytest.approx([1e-60, 4e-60], rel=1e-6, abs=0)
    assert magnitudes(tiny, 1).tolist() == pytest.approx([1e-30, 2e-30], rel=1e-6, abs=0)
    with pytest.raises(PruneError, match="found the power 3"):
        magnitudes(tiny, 3)


def test_rows_are_those_of_the_matrix() -> None:
    with pytest.raises(PruneError, match=r"expected a weight \(3, 4\), found \(4, 3\)"):
        rows_of(torch.zeros(4, 3), (3, 4))
    assert rows_of(torch.arange(12.0).reshape(3, 4), (3, 4))(1, 2).tolist() == [[4, 5, 6, 7]]
    short = rows_of(lambda start, stop: torch.zeros(1, 4), (3, 4))
    with pytest.raises(PruneError, match=r"rows 0 to 3 must have shape \(3, 4\), found \(1, 4\)"):
        short(0, 3)


@pytest.mark.parametrize("role", ["q", "o"])
def test_a_score_on_a_query_head_lands_on_its_kv_head(role: str) -> None:
    for head in range(SHAPE.heads):
        channels = torch.zeros(24)
        channels[head * 3 + head % 3] = 1.0
        expected = [0.0, 0.0]
        expected[head // SHAPE.queries_per_kv] = 1.0
        assert fold(role, channels, SHAPE).tolist() == expected


def test_fold_of_the_other_roles_and_of_samples() -> None:
    assert fold("k", torch.arange(6.0), SHAPE).tolist() == [3.0, 12.0]
    assert fold("down", torch.arange(5.0), SHAPE).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    samples = torch.arange(12.0).reshape(6, 2)
    assert fold("v", samples, SHAPE).tolist() == [[6.0, 9.0], [24.0, 27.0]]
    with pytest.raises(PruneError, match=r"k has 6 channels that can go, found values \(24,\)"):
        fold("k", torch.zeros(24), SHAPE)
    with pytest.raises(PruneError, match=r"k has 6 channels that can go, found values \(\)"):
        fold("k", torch.tensor(1.0), SHAPE)
    with pytest.raises(PruneError, match="unknown role"):
        fold("router", torch.zeros(6), SHAPE)


def members(norm: int | None, scale: float = 1.0) -> MemberScores:
    """q scores 3 and 4, the other kv members 0; gate, up and down score 0 to 4, up times ``scale``."""
    gathered = MemberScores(SHAPE, norm)
    for role in "qkvo":
        gathered.add(role, torch.tensor([3.0, 4.0]) * (role == "q"))
    for role in ("gate", "up", "down"):
        gathered.add(role, torch.arange(5.0) * (scale if role == "up" else 1.0))
    return gathered


def test_members_are_divided_by_their_norm() -> None:
    plain, total, euclid = (members(norm).scores() for norm in (None, 1, 2))
    assert plain["kv"].tolist() == [3.0, 4.0]
    assert plain["ffn"].tolist() == [0.0, 3.0, 6.0, 9.0, 12.0]
    assert total["kv"].tolist() == pytest.approx([3 / 7, 4 / 7])
    assert euclid["kv"].tolist() == pytest.approx([0.6, 0.8])
    assert euclid["ffn"].tolist() == pytest.approx([3 * value / 30**0.5 for value in range(5)])
    assert euclid["kv"].dtype == torch.float64
    # Tiny gradients score as large ones do.
    for norm in (1, 2):
        assert torch.equal(members(norm, 2.0**-100).scores()["ffn"], members(norm).scores()["ffn"])


@pytest.mark.parametrize("norm", [None, 1, 2])
def test_scores_that_are_not_finite_stay_visible(norm: int | None) -> None:
    gathered = members(norm)
    gathered._parts.pop("o")
    gathered.add("o", torch.tensor([1.0, torch.inf]))
    assert not bool(torch.isfinite(gathered.scores()["kv"]).all())


def test_members_must_be_complete_single_and_well_shaped() -> None:
    gathered = MemberScores(SHAPE)
    gathered.add("q", torch.ones(2))
    with pytest.raises(PruneError, match="q was added twice"):
        gathered.add("q", torch.ones(2))
    with pytest.raises(PruneError, match=r"up must have scores \(5,\), found \(2,\)"):
        gathered.add("up", torch.ones(2))
    with pytest.raises(PruneError, match="unknown role"):
        gathered.add("router", torch.ones(2))
    with pytest.raises(PruneError, match="no weight was added for k, v, o, gate, up, down"):
        gathered.scores()
    with pytest.raises(PruneError, match="order 1 or 2 or by none, found 3"):
        MemberScores(SHAPE, 3)


def test_every_role_has_its_channels() -> None:
    for role in ROLES:
        channels = max(shape_of(role, SHAPE)[0 if role not in ("o", "down") else 1], 1)
        assert float(fold(role, torch.ones(channels), SHAPE).sum()) == channels

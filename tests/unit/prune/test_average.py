import pytest
import torch
from torch import Tensor

from prune.average import MovingAverage
from prune.exceptions import PruneError
from prune.groups import LayerShape

SHAPE = LayerShape(hidden=4, heads=2, kv_heads=2, head_dim=2, ffn=3)
STEPS = [([1.0, 2.0], [1.0, 0.0, 4.0]), ([3.0, 0.0], [1.0, 2.0, 0.0]), ([0.0, 5.0], [1.0, 6.0, 2.0])]


def scores(kv: list[float], ffn: list[float], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"kv": torch.tensor(kv, dtype=dtype), "ffn": torch.tensor(ffn, dtype=dtype)}


def values(average: MovingAverage) -> list[dict[str, list[float]]]:
    return [{kind: tensor.tolist() for kind, tensor in layer.items()} for layer in average.scores()]


def test_three_steps_by_hand() -> None:
    average = MovingAverage([SHAPE])
    assert values(average) == [{"kv": [0.0, 0.0], "ffn": [0.0, 0.0, 0.0]}]
    for step in STEPS:
        assert average.update([scores(*step, dtype=torch.float32)])
    (found,) = average.scores()
    # 0.081 of the first, 0.09 of the second, 0.1 of the third.
    assert found["kv"].tolist() == pytest.approx([0.081 + 0.27, 0.162 + 0.5], rel=1e-12)
    assert found["ffn"].tolist() == pytest.approx([0.271, 0.18 + 0.6, 0.324 + 0.2], rel=1e-12)
    assert found["kv"].dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, "kv", 1), (1, "ffn", 2)])
def test_a_score_that_is_not_finite_changes_nothing_anywhere(bad: float, place: tuple[int, str, int]) -> None:
    average, undisturbed = MovingAverage([SHAPE] * 2), MovingAverage([SHAPE] * 2)
    for number, step in enumerate(STEPS):
        layers = [scores(*step), scores(*STEPS[0])]
        if number == 1:
            layer, kind, index = place
            layers[layer][kind][index] = bad
            before = values(average)
            assert not average.update(layers)
            assert values(average) == before
        else:
            assert average.update(layers)
            undisturbed.update(layers)
    assert values(average) == values(undisturbed)


def test_going_on_from_earlier_scores_is_exact() -> None:
    whole = MovingAverage([SHAPE], decay=0.7)
    for step in STEPS:
        whole.update([scores(*step)])
    first = MovingAverage([SHAPE], decay=0.7)
    first.update([scores(*STEPS[0])])
    again = MovingAverage([SHAPE], decay=0.7, start=first.scores())
    for step in STEPS[1:]:
        again.update([scores(*step)])
    assert values(again) == values(whole)


def test_neither_what_comes_in_nor_what_goes_out_is_shared() -> None:
    start, step = scores(*STEPS[0]), scores(*STEPS[1])
    average = MovingAverage([SHAPE], start=[start])
    start["kv"].zero_()
    average.update([step])
    before = values(average)
    step["kv"].zero_()
    average.scores()[0]["kv"].zero_()
    assert values(average) == before
    assert before[0]["kv"] == pytest.approx([0.9 + 0.3, 1.8])


def test_bad_input_is_refused_and_changes_nothing() -> None:
    average = MovingAverage([SHAPE])
    average.update([scores(*STEPS[0])])
    before = values(average)
    for layers, message in (
        ([], "expected scores for 1 layers, found 0"),
        ([{"kv": torch.ones(2)}], r"layer 0: ffn scores must have shape \(3,\), found None"),
        ([scores([1.0], [1.0, 1.0, 1.0])], r"layer 0: kv scores must have shape \(2,\), found \(1,\)"),
    ):
        with pytest.raises(PruneError, match=message):
            average.update(layers)
    assert values(average) == before
    with pytest.raises(PruneError, match=r"a decay must be in \[0, 1\), found 1"):
        MovingAverage([SHAPE], decay=1.0)
    with pytest.raises(PruneError, match="expected scores for 2 layers, found 1"):
        MovingAverage([SHAPE] * 2, start=[scores(*STEPS[0])])
    with pytest.raises(PruneError, match="cannot start from scores that are not finite"):
        MovingAverage([SHAPE], start=[scores([1.0, float("nan")], [0.0] * 3)])

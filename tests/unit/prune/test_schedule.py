import itertools
import math

import pytest

from prune.counting import kept_count
from prune.exceptions import PruneError, RatioError
from prune.schedule import mask_updates, ratio_at


def published(step: int, total: int, target: float, warmup: float, cooldown: float) -> float:
    """The formula as it is written, in floats."""
    if step <= warmup * total:
        return 0.0
    if step > total - cooldown * total:
        return target
    left = 1 - (step - warmup * total) / (total - (warmup + cooldown) * total)
    return target - target * left**3


@pytest.mark.parametrize(("total", "target", "warmup", "cooldown"), [(312, 0.5, 0.1, 0.1), (97, 0.37, 0.25, 0.0)])
def test_ratio_is_the_published_ramp(total: int, target: float, warmup: float, cooldown: float) -> None:
    ratios = [ratio_at(step, total, target, warmup=warmup, cooldown=cooldown) for step in range(total + 1)]
    expected = [published(step, total, target, warmup, cooldown) for step in range(total + 1)]
    assert ratios == pytest.approx(expected, abs=1e-12)
    assert ratios == sorted(ratios)
    assert ratios[0] == 0.0
    assert ratios[-1] == target
    on_the_ramp = [step for step in range(total + 1) if warmup * total < step < total - cooldown * total]
    assert all(0 < ratios[step] < target for step in on_the_ramp)


def test_ends_and_midpoint_are_exact() -> None:
    # A tenth of 10 steps is 1, and of 30 is 3, though 0.1 is no binary number.
    for total in (10, 30, 100):
        assert ratio_at(total / 10, total, 0.5) == 0.0
        assert ratio_at(total / 10 + 1, total, 0.5) > 0.0
        assert ratio_at(total * 9 / 10 - 1, total, 0.5) < 0.5
        assert ratio_at(total * 9 / 10, total, 0.5) == 0.5
        assert ratio_at(total / 2, total, 0.5) == 0.4375
    assert ratio_at(50, 100, 0.3) == pytest.approx(0.3 * 0.875, rel=1e-15)


def test_the_last_renewal_is_at_the_target() -> None:
    updates = mask_updates(312, 0.5)
    steps, ratios = zip(*updates, strict=True)
    assert steps == (*range(40, 281, 10), 281)
    assert ratios[:-1] == tuple(ratio_at(step, 312, 0.5) for step in steps[:-1])
    assert ratios[-1] == 0.5
    assert all(before < after for before, after in itertools.pairwise(ratios))
    # As published, with ratio < target and rounding down, 15 of 32 heads go.
    assert ratios[-2] < 0.5
    assert math.floor(32 * ratios[-2]) == 15
    assert 32 - kept_count(32, ratios[-1], 1) == 16


@pytest.mark.parametrize(
    ("total", "target"), [(total, target) for total in (1, 2, 9, 10, 100, 312) for target in (0.2, 0.5, 0.999)]
)
def test_counts_never_fall_and_end_exactly(total: int, target: float) -> None:
    updates = mask_updates(total, target, interval=3)
    gone = [1000 - kept_count(1000, ratio, 1) for _, ratio in updates]
    assert gone == sorted(gone)
    assert gone[-1] == round(1000 * target)
    steps = [step for step, _ in updates]
    assert all(before < after for before, after in itertools.pairwise(steps))
    assert steps[-1] <= total


def test_where_the_ramp_has_no_room_the_target_still_comes() -> None:
    assert mask_updates(5, 0.5, interval=10) == ((5, 0.5),)
    assert mask_updates(100, 0.5, interval=1000) == ((90, 0.5),)
    assert mask_updates(10, 0.25, warmup=0.0, cooldown=0.5, interval=5) == ((5, 0.25),)
    # Without a cool-down, after the last step.
    assert mask_updates(20, 0.5, warmup=0.0, cooldown=0.0)[-1] == (20, 0.5)
    assert mask_updates(20, 0.5, warmup=0.0, cooldown=0.0)[0] == (10, 0.4375)
    assert mask_updates(100, 0.0) == ()


def test_bad_input_is_refused() -> None:
    for target in (1.0, -0.1, float("nan")):
        with pytest.raises(RatioError, match=r"a pruning ratio must be in \[0, 1\)"):
            ratio_at(0, 10, target)
    with pytest.raises(PruneError, match="at least one step, found 0"):
        mask_updates(0, 0.5)
    for warmup, cooldown in ((-0.1, 0.1), (0.1, -0.1), (float("nan"), 0.1), (0.1, float("inf"))):
        with pytest.raises(PruneError, match="shares of all steps"):
            ratio_at(0, 10, 0.5, warmup=warmup, cooldown=cooldown)
    with pytest.raises(PruneError, match=r"a warm-up of 0.3 and a cool-down of 0.7 leave no steps"):
        ratio_at(0, 10, 0.5, warmup=0.3, cooldown=0.7)
    with pytest.raises(PruneError, match="at least 1, found 0"):
        mask_updates(10, 0.5, interval=0)

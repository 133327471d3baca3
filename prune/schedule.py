"""When masks are renewed while a model is trained, and how much of it is gone by then."""

import math
from fractions import Fraction

from prune.counting import exact_ratio
from prune.exceptions import PruneError, RatioError


def ratio_at(step: float, total_steps: int, target: float, *, warmup: float = 0.1, cooldown: float = 0.1) -> float:
    """The share of groups that is to be gone at ``step`` of ``total_steps``: LoRAPrune's cubic ramp.

    0 up to warmup * total_steps, ``target`` from total_steps - cooldown * total_steps, and in between
    target * (1 - (1 - x)^3) for the share x of the ramp that is done (arXiv 2305.18403, released code; the form is that
    of arXiv 1710.01878). Exact arithmetic on the decimals that are given, rounded once, so it never decreases.

    Raises RatioError for a target outside [0, 1), PruneError for fewer than one step, or for a warm-up and cool-down
    that are negative or leave no ramp.
    """
    start, end = _ramp(total_steps, target, warmup, cooldown)
    if step >= end:
        return target
    if step <= start:
        return 0.0
    left = 1 - (Fraction(step) - start) / (end - start)
    return float(exact_ratio(target) * (1 - left**3))


def mask_updates(
    total_steps: int, target: float, *, warmup: float = 0.1, cooldown: float = 0.1, interval: int = 10
) -> tuple[tuple[int, float], ...]:
    """(step, ratio) of every renewal of the masks, steps ascending, the last at exactly ``target``.

    Steps are counted from 0. Masks are renewed at multiples of ``interval`` on the ramp, and once when it has ended: at
    the first step with ``ratio_at`` = target, which is ``total_steps``, after the last step, if there is no cool-down.
    The released code has no such last renewal and stops short of the target. Groups that go at a ratio are to be
    counted by rounding, as ``kept_count`` does; rounding down loses one where the ratio is a hair below. Nothing for a
    target of 0. Raises as ``ratio_at``, and PruneError for an interval below 1.
    """
    start, end = _ramp(total_steps, target, warmup, cooldown)
    if interval < 1:
        raise PruneError(f"masks are renewed every so many steps, at least 1, found {interval}")
    if target == 0:
        return ()
    last = math.ceil(end)
    first = (math.floor(start) // interval + 1) * interval
    steps = range(first, last, interval)
    options = {"warmup": warmup, "cooldown": cooldown}
    return (*((step, ratio_at(step, total_steps, target, **options)) for step in steps), (last, target))


def _ramp(total_steps: int, target: float, warmup: float, cooldown: float) -> tuple[Fraction, Fraction]:
    """Where the ramp begins and ends, in steps."""
    if total_steps < 1:
        raise PruneError(f"a schedule needs at least one step, found {total_steps}")
    if not 0 <= target < 1:
        raise RatioError(f"a pruning ratio must be in [0, 1), found {target}")
    if not (warmup >= 0 and cooldown >= 0 and math.isfinite(warmup + cooldown)):
        raise PruneError(f"warm-up and cool-down are shares of all steps, found {warmup} and {cooldown}")
    before, after = exact_ratio(warmup), exact_ratio(cooldown)
    if before + after >= 1:
        raise PruneError(f"a warm-up of {warmup} and a cool-down of {cooldown} leave no steps to prune in")
    return before * total_steps, (1 - after) * total_steps

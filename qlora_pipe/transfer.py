"""Figures of recovery: how much of what the small model learned reaches the full one."""

from collections.abc import Mapping
from typing import NamedTuple


class Losses(NamedTuple):
    """Mean held-out losses (nats per token) of the two models, each without and with the adapter."""

    full: float
    full_adapted: float
    small: float
    small_adapted: float


def transfer_efficiency(losses: Losses) -> float | None:
    """tau = [L(full) - L(full + R)] / [L(small) - L(small + adapter)]; None if the small model gained nothing.

    Source: LoRAM, arXiv 2502.13533, as a single number.
    """
    gained = losses.small - losses.small_adapted
    return (losses.full - losses.full_adapted) / gained if gained > 0 else None


def choose_scale(loss_by_scale: Mapping[float, float]) -> float:
    """The adapter scale with the lowest held-out loss; 0 unless another one is strictly better, then the smallest."""
    return min(loss_by_scale, key=lambda scale: (loss_by_scale[scale], abs(scale)))


def choose_adapter(losses: Mapping[str, Mapping[float, float]]) -> tuple[str, float]:
    """Of several adapters, by name and scale, the one with the lowest held-out loss and its scale; the first unless
    another one is strictly better."""
    scales = {name: choose_scale(found) for name, found in losses.items()}
    best = min(losses, key=lambda name: losses[name][scales[name]])
    return best, scales[best]


class UnquantiseGap(NamedTuple):
    """Losses of the small model under L4Q: integers as trained, W + BA left unquantised, integers without BA."""

    quantised: float
    unquantised: float
    without_adapter: float

    def report(self) -> dict[str, float | None]:
        """The three losses; the gap eps = L(W + BA) - L(Wq), the task gain g = L(Wq without BA) - L(Wq), and eps / g.

        BA may be used away from its grid only where |eps| is a small share of g.
        """
        gap, gain = self.unquantised - self.quantised, self.without_adapter - self.quantised
        return {**self._asdict(), "gap": gap, "gain": gain, "share": gap / gain if gain > 0 else None}

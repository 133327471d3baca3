"""What scores need to know of the inputs of o and down: their means, and the gradients of gates on them."""

import torch
from torch import Tensor

from prune.exceptions import PruneError

# Tokens worked on at once: bounds the fp64 temporaries to 6 KB a feature.
_CHUNK = 256


class ReaderMoments:
    """Sums over the inputs x of one linear map whose columns are pruned.

    ``gates`` fp64 [samples, features]: for each sample the sum over its tokens of x_j dloss/dx_j, the gradient of a
    gate of 1 on channel j (see ``prune.taylor.gates``). ``input_sums`` fp64 [features], ``input_tokens``: of x alone.
    """

    def __init__(self, features: int, samples: int, *, device: torch.device | str | None = None) -> None:
        self.gates = torch.zeros(samples, features, dtype=torch.float64, device=device)
        self.input_sums = torch.zeros(features, dtype=torch.float64, device=device)
        self.input_tokens = 0

    @torch.no_grad()
    def update_input(self, x: Tensor) -> None:
        """Add inputs [..., features] of any float dtype. Raises PruneError for another width."""
        self._check(x, self.input_sums.shape)
        for part in torch.split(x.reshape(-1, x.shape[-1]), _CHUNK):
            self.input_sums += part.to(self.input_sums).sum(dim=0)
        self.input_tokens += x.numel() // x.shape[-1]

    @torch.no_grad()
    def update_gates(self, x: Tensor, gradient: Tensor, samples: slice) -> None:
        """Add inputs and their gradients, [samples, tokens, features] each, of these samples.

        Raises PruneError for shapes that do not fit.
        """
        into = self.gates[samples]
        self._check(x, into.shape[-1:])
        if x.ndim != 3 or x.shape != gradient.shape or len(x) != len(into):
            raise PruneError(
                f"expected inputs and gradients of {len(into)} samples, found {tuple(x.shape)} and "
                f"{tuple(gradient.shape)}"
            )
        for values, gradients in zip(torch.split(x, _CHUNK, 1), torch.split(gradient, _CHUNK, 1), strict=True):
            for sample in range(len(into)):
                into[sample] += (values[sample].to(into) * gradients[sample].to(into)).sum(dim=0)

    def mean(self) -> Tensor:
        """Mean of each input over all tokens: fp32 [features]. Raises PruneError before the first update."""
        if not self.input_tokens:
            raise PruneError("no inputs were seen; call update_input first")
        return (self.input_sums / self.input_tokens).float()

    def _check(self, x: Tensor, width: tuple[int, ...]) -> None:
        if x.shape[-1:] != width:
            raise PruneError(f"expected inputs [..., {width[0]}], found {tuple(x.shape)}")


def variance(squares: Tensor, mean: Tensor) -> Tensor:
    """Variance of each input from its mean square and its mean [features]: fp64, what rounds below zero is 0.

    Raises PruneError for shapes that differ.
    """
    if squares.shape != mean.shape:
        raise PruneError(f"expected a mean for every mean square, found {tuple(squares.shape)} and {tuple(mean.shape)}")
    return (squares.to(torch.float64) - mean.to(torch.float64).square()).clamp(min=0)

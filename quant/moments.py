"""Second moments of a linear layer's inputs and output gradients."""

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError

# Tokens squared at once: bounds the float64 temporary to 2 KB a feature.
_CHUNK = 256


class DiagonalMoments:
    """Mean x^2 per input and mean g^2 per output of y = W x, g = dloss/dy: a Kronecker Fisher's diagonals.

    Their roots are the column and row weights of the weighted low-rank fit; if x and g are independent they
    equal, up to a constant, the root-mean Fisher columns and rows of LQ-LoRA (arXiv 2311.12023), without a
    Fisher of the size of W. Attributes: input_squares fp64 [in_features], grad_squares fp64 [out_features],
    input_tokens, grad_tokens.
    """

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str | None = None) -> None:
        self.input_squares = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.grad_squares = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.input_tokens = 0
        self.grad_tokens = 0

    def update_input(self, x: Tensor) -> None:
        """Add inputs [..., in_features] of any float dtype; ShapeError or NonFiniteError adds nothing."""
        self.input_squares += _squares(x, self.input_squares, "inputs")
        self.input_tokens += x.numel() // x.shape[-1]

    def update_grad(self, g: Tensor) -> None:
        """Add gradients [..., out_features] of any float dtype; ShapeError or NonFiniteError adds nothing."""
        self.grad_squares += _squares(g, self.grad_squares, "gradients")
        self.grad_tokens += g.numel() // g.shape[-1]

    def merge(self, other: "DiagonalMoments") -> None:
        """Add the sums of another run over the same layer. Raises ShapeError when the layers differ."""
        same_inputs = self.input_squares.shape == other.input_squares.shape
        if not (same_inputs and self.grad_squares.shape == other.grad_squares.shape):
            raise ShapeError("moments of layers of different shape cannot be merged")
        self.input_squares += other.input_squares.to(self.input_squares.device)
        self.grad_squares += other.grad_squares.to(self.grad_squares.device)
        self.input_tokens += other.input_tokens
        self.grad_tokens += other.grad_tokens

    def column_weight(self) -> Tensor:
        """Root mean square of each input: fp32 [in_features]. Raises QuantError before the first update."""
        if not self.input_tokens:
            raise QuantError("no inputs were seen; call update_input first")
        return (self.input_squares / self.input_tokens).sqrt().float()

    def row_weight(self) -> Tensor:
        """Root mean square of each output gradient: fp32 [out_features]. Raises QuantError before the first
        update."""
        if not self.grad_tokens:
            raise QuantError("no gradients were seen; call update_grad first")
        return (self.grad_squares / self.grad_tokens).sqrt().float()


@torch.no_grad()
def _squares(values: Tensor, into: Tensor, what: str) -> Tensor:
    if values.dim() < 1 or values.shape[-1] != len(into):
        raise ShapeError(f"{what} must be [..., {len(into)}], got {list(values.shape)}")
    total = torch.zeros_like(into)
    tokens = values.reshape(-1, len(into))
    for start in range(0, len(tokens), _CHUNK):
        total += tokens[start : start + _CHUNK].to(into).square().sum(dim=0)
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteError(f"{what} hold NaN or infinity")
    return total

"""Second moments of a linear layer's inputs and output gradients: diagonals, and the full input covariance."""

import math

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError

# Tokens squared at once: bounds the float64 temporary to 2 KB a feature.
_CHUNK = 256
# Tokens of one fp32 product, and rows of the covariance it fills: bound the temporaries to 12 KB a feature.
_PRODUCT = 1024
_PANEL = 1024


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


class Covariance:
    """H = sum_t w_t x_t x_t^T / sum_t w_t over the tokens t of an input x.

    With w_t the squared norm of the loss gradient at the outputs that read x, H and the gradients' own mean are the
    two factors of the Fisher information of those linear maps, had it Kronecker's form (K-FAC, arXiv 1503.05671, with
    the token's two sides left dependent); with w_t = 1, H is the plain second moment of GPTQ (arXiv 2210.17323).
    Products are fp32, of 1,024 tokens at a time, and their sum is float64.

    Peak bytes: 8 n^2 for the sum, and 12 KB a feature for products and scaled tokens. Attributes: total fp64 [n, n],
    whose lower triangle counts; weight, the sum of w_t; largest, the greatest w_t ||x_t||^2.
    """

    def __init__(self, features: int, *, device: torch.device | str | None = None) -> None:
        self.total = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.weight = 0.0
        self.largest = 0.0

    @torch.no_grad()
    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add tokens x [..., n] of any float dtype with weights [...] >= 0, none for 1 each.

        Raises ShapeError, NonFiniteError (also if a square leaves fp32), or QuantError for a negative weight; then
        nothing is added.
        """
        features = len(self.total)
        if x.dim() < 1 or x.shape[-1] != features:
            raise ShapeError(f"inputs must be [..., {features}], got {list(x.shape)}")
        if weight is None:
            weight = torch.ones(x.shape[:-1], device=x.device)
        elif weight.shape != x.shape[:-1]:
            raise ShapeError(
                f"weights of inputs {list(x.shape)} must be {list(x.shape[:-1])}, got {list(weight.shape)}"
            )
        tokens, weights = x.reshape(-1, features), weight.reshape(-1).to(x.device, torch.float32)
        if not len(tokens):
            return
        sizes = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32).square() * weights
        if not bool(torch.isfinite(sizes).all()):
            raise NonFiniteError("inputs or their weights hold NaN or infinity")
        if bool((weights < 0).any()):
            raise QuantError(f"weights must not be negative, got {weights.min().item():g}")
        for start in range(0, len(tokens), _PRODUCT):
            root = weights[start : start + _PRODUCT].sqrt()
            scaled = tokens[start : start + _PRODUCT].float() * root[:, None]
            for low in range(0, features, _PANEL):
                high = min(low + _PANEL, features)
                self.total[low:high, :high] += scaled[:, low:high].T @ scaled[:, :high]
        self.weight += weights.double().sum().item()
        self.largest = max(self.largest, sizes.max().item())

    def merge(self, other: "Covariance") -> None:
        """Add the sums of another run over the same input. Raises ShapeError when the widths differ."""
        if self.total.shape != other.total.shape:
            raise ShapeError(f"covariances of {len(self.total)} and {len(other.total)} features cannot be merged")
        self.total += other.total.to(self.total.device)
        self.weight += other.weight
        self.largest = max(self.largest, other.largest)

    def mean(self) -> Tensor:
        """H, symmetric to the bit: fp64 [n, n]. Raises QuantError if the weights sum to zero. Peak: 16 n^2 bytes more.

        An input feature that is always zero has a zero row and column.
        """
        return _mirrored((self.total / self._positive_weight()).tril_())

    def damped(self, fraction: float) -> Tensor:
        """H + fraction * mean(diagonal of H) * identity: fp64 [n, n]. Raises as mean()."""
        result = self.mean()
        diagonal = result.diagonal()
        diagonal += fraction * diagonal.mean()
        return result

    def diagonal(self) -> Tensor:
        """Weighted mean square of each input: fp64 [n]. Raises QuantError if the weights sum to zero."""
        return self.total.diagonal() / self._positive_weight()

    def triangle(self) -> Tensor:
        """mean() as pack_triangle stores it, without the square: fp32 [n (n + 1) / 2]. Raises as mean()."""
        return pack_triangle(self.total, 1 / self._positive_weight())

    def top_share(self) -> float:
        """Share of H's trace that the heaviest token alone carries, 0..1; near 1, H is that token's outer product."""
        trace = self.total.diagonal().sum().item()
        return min(1.0, self.largest / trace) if trace else 0.0

    def _positive_weight(self) -> float:
        if not self.weight > 0:
            raise QuantError("the token weights sum to zero; give tokens of positive weight to update first")
        return self.weight


def token_weights(norms: Tensor) -> Tensor:
    """Squared gradient norms [tokens] scaled to mean 1, fp32; ones where all are zero, for then no token matters more.

    Raises NonFiniteError for NaN or infinity, QuantError for a negative norm.
    """
    mean = norms.double().mean().item() if norms.numel() else 0.0
    if not math.isfinite(mean):
        raise NonFiniteError("gradient norms hold NaN or infinity")
    if norms.numel() and norms.min().item() < 0:
        raise QuantError(f"squared norms must not be negative, got {norms.min().item():g}")
    return (norms.double() / mean).float() if mean else torch.ones_like(norms, dtype=torch.float32)


def pack_triangle(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """Lower triangle of `scale` times a matrix [n, n], row by row: fp32 [n (n + 1) / 2]. Raises ShapeError."""
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a triangle needs a matrix [n, n], got {list(matrix.shape)}")
    packed = torch.empty(triangle_size(len(matrix)), dtype=torch.float32, device=matrix.device)
    for row in range(len(matrix)):
        start = triangle_size(row)
        packed[start : start + row + 1] = matrix[row, : row + 1] * scale
    return packed


def unpack_triangle(packed: Tensor) -> Tensor:
    """The symmetric matrix of a packed lower triangle [n (n + 1) / 2]: [n, n] in its dtype.

    Raises ShapeError for a length that is no triangle's. Peak bytes: twice the result's.
    """
    n = (math.isqrt(8 * packed.numel() + 1) - 1) // 2
    if packed.dim() != 1 or triangle_size(n) != packed.numel():
        raise ShapeError(f"expected a packed triangle of n (n + 1) / 2 entries, got {list(packed.shape)}")
    matrix = packed.new_zeros(n, n)
    for row in range(n):
        start = triangle_size(row)
        matrix[row, : row + 1] = packed[start : start + row + 1]
    return _mirrored(matrix)


def triangle_size(features: int) -> int:
    """Entries of the lower triangle of a square matrix, its diagonal counted."""
    return features * (features + 1) // 2


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle, in place."""
    lower += lower.tril(-1).T
    return lower

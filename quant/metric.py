"""What an error of a weight costs: plain, diagonal or full input covariance, with weights of the outputs.

For y = W x and g = dloss/dy the second-order cost of W -> W - E is tr(G E H E^T) with H = E[x x^T] and G = E[g g^T], if
x and g are independent. G enters by its diagonal, which is what makes matrices comparable; H whole, or by its diagonal.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.lowrank import floored, svd_lowrank

# Elements scored at once: bounds the temporaries to a few MB.
_CHUNK = 1 << 18

_OVERSAMPLING = 10
_POWER_ITERATIONS = 3


@dataclass(frozen=True)
class Metric:
    """Weights of the squared error of a matrix [m, n] = [outputs, inputs]; None is no weighting.

    outputs: fp32 [m], root mean square output gradients. inputs: fp32 [n], root mean square inputs. covariance: fp32
    [n, n], symmetric, positive semidefinite, E[x x^T]; excludes `inputs`. With outputs and inputs the metric is the
    data-aware one of LQ-LoRA (arXiv 2311.12023, section 3.3); with a covariance alone that of QERA-exact (arXiv
    2410.06040) and CALDERA (2405.18886). Raises QuantError for both inputs and covariance.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.inputs is not None and self.covariance is not None:
            raise QuantError("a metric has input weights or an input covariance, not both")

    @property
    def transposed(self) -> "Metric":
        """The metric of the transposed matrix; QuantError with a covariance, which stays on its side."""
        if self.covariance is not None:
            raise QuantError("a covariance cannot change sides")
        return Metric(self.inputs, self.outputs)

    def loss(self, error: Tensor) -> float:
        """The sum of `by_output`, which see. Rounding in its fp32 product can bring a tiny loss below zero, which is 0
        then; NaN stays."""
        return float(self.by_output(error).sum().clamp(min=0))

    @torch.no_grad()
    def by_output(self, error: Tensor) -> Tensor:
        """``outputs_i^2 (E H E^T)_ii`` of an error [m, n]: float64 [m]; H is diag(inputs^2) without a covariance.

        Peak: a few MB, or twice `error` with a covariance. Raises ShapeError when a weight has another length.
        """
        self._check(error)
        m, n = error.shape
        rows = _root(self.outputs, error, m).square()
        step = max(1, _CHUNK // n)
        if self.covariance is not None:
            product = error @ self.covariance
            by_row = [(error[i : i + step].double() * product[i : i + step]).sum(dim=1) for i in range(0, m, step)]
        else:
            columns = _root(self.inputs, error, n).square()
            by_row = [error[i : i + step].double().square() @ columns for i in range(0, m, step)]
        return torch.cat(by_row) * rows

    @torch.no_grad()
    def fit(self, matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors left [m, rank], right [rank, n] of the rank-`rank` part of `matrix` that lowers its loss most.

        With a covariance in the inverse-free form: left = U, right = U^T A for the leading eigenvectors U of A H A^T,
        A = diag(outputs) matrix, found by subspace iteration with QR. No root and no inverse of H is taken, so a
        singular H is no exception. Otherwise `svd_lowrank`. Directions come sorted: a smaller rank is a slice. Each
        component's two sides have the same norm. Peak: two copies of `matrix`. Raises as `svd_lowrank`.
        """
        self._check(matrix)
        if self.covariance is None:
            return svd_lowrank(matrix, rank, generator=generator, row_weight=self.outputs, column_weight=self.inputs)
        if not 0 <= rank <= min(matrix.shape):
            raise ShapeError(f"rank {rank} is outside 0..{min(matrix.shape)} for a {list(matrix.shape)} matrix")
        if not bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all()):
            raise NonFiniteError("matrix holds NaN or infinity")
        if rank == 0:
            return matrix.new_empty(matrix.shape[0], 0), matrix.new_empty(0, matrix.shape[1])
        weight = floored(self.outputs, matrix, 0)
        weighted = matrix if weight is None else matrix * weight[:, None]
        left = _leading(weighted, self.covariance, rank, generator)
        right = left.T @ weighted
        if weight is not None:
            left = left / weight[:, None]
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-30)
        return left * balance, right / balance[:, None]

    def _check(self, matrix: Tensor) -> None:
        if matrix.dim() != 2:
            raise ShapeError(f"expected a matrix, got {list(matrix.shape)}")
        m, n = matrix.shape
        for name, tensor, shape in (
            ("output weights", self.outputs, (m,)),
            ("input weights", self.inputs, (n,)),
            ("covariance", self.covariance, (n, n)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ShapeError(f"{name} must be {list(shape)} for a {[m, n]} matrix, got {list(tensor.shape)}")


def _leading(matrix: Tensor, covariance: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Leading eigenvectors [m, rank] of ``matrix @ covariance @ matrix.T``, sorted."""
    m = matrix.shape[0]
    size = min(rank + _OVERSAMPLING, m)
    probe = torch.randn(m, size, generator=generator, device=generator.device, dtype=matrix.dtype)
    basis = torch.linalg.qr(probe.to(matrix.device)).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ (covariance @ (matrix.T @ basis))).Q
    inner = matrix.T @ basis
    values, vectors = torch.linalg.eigh((inner.T @ (covariance @ inner)).double())
    order = values.argsort(descending=True)[:rank]
    leading: Tensor = basis @ vectors[:, order].to(basis)
    return leading


def _root(weight: Tensor | None, like: Tensor, size: int) -> Tensor:
    found = like.new_ones(size) if weight is None else weight
    return found.to(like.device, torch.float64)

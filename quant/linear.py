"""The packed decomposed linear map ``W = Q + left @ right``, with an optional trainable task adapter.

Q is stored as packed codes and rebuilt in row chunks at every use, in forward and again in backward; nothing
of the size of the weight is kept between them. A transposed map stores Q as [in, out], so that the axis that
pruning cuts is always the row axis of the stored matrix: slicing rows of the buffers slices the map exactly.

Source: LQ-LoRA, arXiv 2311.12023 (Q + L1 L2); QLoRA, arXiv 2305.14314 (rebuild at use).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.buffers import first_level_scales, slice_rows, zero_points
from quant.exceptions import QuantError
from quant.lookup import dequantize_packed
from quant.lora import adapted, fresh_factors
from quant.rebuild import add_product_, autocast_input, check_input, row_chunks, without_autocast
from quant.scales import torch_dtype
from quant.storage import PackedShape

Buffers = Mapping[str, Tensor]

# Weights rebuilt at once: they are still in the CPU's cache when they are multiplied.
_CHUNK = 1 << 18


def _stored_chunks(buffers: Buffers, shape: PackedShape) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the stored Q, fp32 [chunk, columns], in order."""
    scale, zero = first_level_scales(buffers, shape), zero_points(buffers, shape)
    for rows in row_chunks(shape.rows, shape.columns, max(1, _CHUNK // shape.columns)):
        yield rows, _stored_rows(buffers, shape, rows, scale, zero)


def _stored_rows(buffers: Buffers, shape: PackedShape, rows: slice, scale: Tensor, zero: Tensor | None) -> Tensor:
    return dequantize_packed(
        buffers["codes"][rows],
        shape.choice.bits,
        shape.columns,
        scale[rows],
        buffers["levels"],
        None if zero is None else zero[rows],
    )


def _product(v: Tensor, buffers: Buffers, shape: PackedShape, along_input: bool) -> Tensor:
    """``v @ W^T`` (``along_input``) or ``v @ W`` for W = Q + L1 L2."""
    left, right = buffers["lowrank_left"], buffers["lowrank_right"]
    first, second = (right.t(), left.t()) if along_input else (left, right)
    hidden = v @ first.to(v.dtype)
    if "lowrank_scale" in buffers:
        hidden = hidden * buffers["lowrank_scale"].to(v.dtype)
    total = (hidden @ second.to(v.dtype)).to(torch.promote_types(v.dtype, torch.float32))
    for rows, weight in _stored_chunks(buffers, shape):
        weight = weight.to(v.dtype)
        if along_input != shape.transposed:
            add_product_(total[:, rows], v, weight.t())
        else:
            add_product_(total, v[:, rows], weight)
    return total.to(v.dtype)


class _FrozenMap(torch.autograd.Function):
    """``x @ (Q + L1 L2)^T``; keeps references to the buffers for backward, neither x nor a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: PackedShape, names: tuple[str, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.shape, ctx.names = shape, names
        with without_autocast(x):
            buffers = dict(zip(names, tensors, strict=True))
            y = _product(x.reshape(-1, x.shape[-1]), buffers, shape, along_input=True)
        return y.view(*x.shape[:-1], shape.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        shape, buffers = ctx.shape, dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        with without_autocast(grad_y):
            grad_x = _product(grad_y.reshape(-1, grad_y.shape[-1]), buffers, shape, along_input=False)
        return grad_x.view(*grad_y.shape[:-1], shape.in_features), *([None] * (2 + len(buffers)))


def product(x: Tensor, buffers: Buffers, shape: PackedShape) -> Tensor:
    """``x @ (Q + left @ right)^T``: [..., in] -> [..., out] in x's dtype (autocast's dtype under autocast).

    Differentiable in x alone, of which nothing is kept. Raises ShapeError for another width of x.
    """
    check_input(x, shape.in_features)
    found: Tensor = _FrozenMap.apply(  # type: ignore[no-untyped-call]
        autocast_input(x), shape, tuple(buffers), *buffers.values()
    )
    return found


def dense_weight(buffers: Buffers, shape: PackedShape, include_lowrank: bool = True) -> Tensor:
    """W or Q, fp32 [out, in]; see `PackedMatrix.dequantized`."""
    left, right = _exact_factors(buffers)
    dense = torch.empty(shape.out_features, shape.in_features, dtype=torch.float32, device=left.device)
    stored, first, second = (dense.t(), right.t(), left.t()) if shape.transposed else (dense, left, right)
    for rows, weight in _stored_chunks(buffers, shape):
        stored[rows] = (first[rows] @ second + weight).float() if include_lowrank else weight
    return dense


def weight_rows(buffers: Buffers, shape: PackedShape, rows: slice) -> Tensor:
    """Rows of W, fp32 [rows, in], of a map that is not transposed: those of `dense_weight`. Peak bytes: 16 x rows x in,
    the map's scales in fp32 and its factors in fp64."""
    weight = _stored_rows(buffers, shape, rows, first_level_scales(buffers, shape), zero_points(buffers, shape))
    if not shape.choice.rank:
        return weight
    left, right = _exact_factors(buffers)
    return (left[rows] @ right).add_(weight).float()


def _exact_factors(buffers: Buffers) -> tuple[Tensor, Tensor]:
    """Low-rank factors in fp64, a component's scale in the left one."""
    left, right = buffers["lowrank_left"].double(), buffers["lowrank_right"].double()
    return left * buffers["lowrank_scale"] if "lowrank_scale" in buffers else left, right


class PackedMatrix(nn.Module):
    """W = Q + left @ right as it is stored, to be looked up or multiplied.

    Every stored tensor is a buffer with the name, dtype and shape of ``shape.buffers()``; load them with
    ``load_state_dict``.

    Raises:
        ShapeError: the choice's blocks or superblocks do not divide the stored matrix.
    """

    bias: Tensor | None

    def __init__(self, shape: PackedShape, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("bias", None)
        self._spec = {name: (torch_dtype(dtype), size) for name, (dtype, size) in shape.buffers().items()}
        for name, (dtype, size) in self._spec.items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))

    @property
    def qweight(self) -> Tensor:
        """The packed codes, under the name by which adapter libraries find where a quantised layer lives."""
        return self.get_buffer("codes")

    @torch.no_grad()
    def dequantized(self, include_lowrank: bool = True) -> Tensor:
        """Dense weight, fp32 [out, in].

        A row of the stored orientation depends on the buffers of that row only. The low-rank product is
        summed in fp64, where products of factors of up to 16 bits are exact, also with a component's scale, so
        a row is the same bits in a full and in a sliced map.

        Peak bytes: 4 x out x in for the result, plus about 7 x 2**20 for the chunk being rebuilt.
        """
        return dense_weight(self.frozen(), self.shape, include_lowrank)

    def frozen(self) -> dict[str, Tensor]:
        """The buffers W is made of; raises QuantError for one that was cast to another dtype."""
        found = {name: self.get_buffer(name) for name in self._spec if name != "bias"}
        for name, tensor in found.items():
            expected = self._spec[name][0]
            # Factors serve in any floating dtype; everything else means what it does in its own alone.
            if tensor.dtype != expected and name not in ("lowrank_left", "lowrank_right"):
                raise QuantError(
                    f"{name} was cast to {tensor.dtype}, but a packed map keeps {expected}: move it between devices, "
                    "keep its dtypes"
                )
        return found

    def extra_repr(self) -> str:
        shape = self.shape
        return (
            f"in_features={shape.in_features}, out_features={shape.out_features}, choice={shape.choice.name}, "
            f"transposed={shape.transposed}"
        )


class PackedLinear(PackedMatrix):
    """``y = x @ Q^T + (x @ right^T) @ left^T + bias``, plus the task adapter when one is attached, of which
    `dequantized` knows nothing.

    Peak bytes beyond the result: forward and backward about 3 x 2**20 for the chunk being rebuilt, and an
    fp32 copy of the result for half-precision activations. Raises as `PackedMatrix`.
    """

    task_a: nn.Parameter | None
    task_b: nn.Parameter | None

    def __init__(self, shape: PackedShape, device: torch.device | str | None = None) -> None:
        super().__init__(shape, device)
        self.register_parameter("task_a", None)
        self.register_parameter("task_b", None)
        self.task_scale = 0.0
        self._part: tuple[dict[str, Tensor], PackedShape, Tensor] | None = None

    def attach_adapter(self, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Add a trainable adapter: fp32 ``task_a`` [rank, in] and ``task_b`` [out, rank].

        ``task_a`` is Kaiming-uniform (a = sqrt 5) and drawn on the generator's device, ``task_b`` is zeros.
        The adapter adds ``alpha / rank * (x @ task_a^T) @ task_b^T``: nothing at first.

        Raises:
            ShapeError: rank below 1. QuantError: an adapter is already attached.
        """
        task_a, task_b = fresh_factors(self.shape.out_features, self.shape.in_features, rank, generator)
        if self.task_a is not None:
            raise QuantError("an adapter is already attached to this layer")
        device = self.qweight.device
        self.task_a, self.task_b = nn.Parameter(task_a.to(device)), nn.Parameter(task_b.to(device))
        self.task_scale = alpha / rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """The low-rank part, fp32 left [out, rank] and right [rank, in], a component's scale in the left one."""
        left, right = _exact_factors(self.frozen())
        return left.float(), right.float()

    def train_factors(self) -> None:
        """Make the low-rank part the adapter, fp32 ``task_a`` [rank, in] and ``task_b`` [out, rank] with scale 1: what
        is frozen is Q alone from now on. Raises QuantError where an adapter is attached already."""
        if self.task_a is not None:
            raise QuantError("an adapter is already attached to this layer")
        left, right = self.factors()
        self.shape = replace(self.shape, choice=replace(self.shape.choice, rank=0))
        self._spec = {name: (torch_dtype(dtype), size) for name, (dtype, size) in self.shape.buffers().items()}
        for name, (dtype, size) in self._spec.items():
            if name.startswith("lowrank_"):
                self.register_buffer(name, torch.zeros(size, dtype=dtype, device=left.device))
        self.task_a, self.task_b, self.task_scale = nn.Parameter(right), nn.Parameter(left), 1.0

    def narrow(self, rows: Tensor) -> None:
        """From now on compute as the map that keeps these rows of the stored matrix (int64, ascending): outputs, or
        inputs if it is transposed. Buffers and adapter stay whole; what is left out of the adapter gets no gradient.

        Peak bytes: the packed rows that are kept.
        """
        shape, rows = self.shape, rows.to(self.qweight.device)
        part = replace(shape, choice=shape.choice.sliced())
        if shape.transposed:
            part = replace(part, in_features=len(rows))
        else:
            part = replace(part, out_features=len(rows))
        self._part = slice_rows(self.frozen(), shape, rows), part, rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in x's dtype (autocast's dtype under autocast)."""
        x = autocast_input(x)
        bias: Tensor | None = self.bias
        task_a: Tensor | None = self.task_a
        task_b: Tensor | None = self.task_b
        if self._part is None:
            y = product(x, self.frozen(), self.shape)
        else:
            buffers, shape, rows = self._part
            y = product(x, buffers, shape)
            if shape.transposed:
                task_a = None if task_a is None else task_a.index_select(1, rows)
            else:
                task_b = None if task_b is None else task_b.index_select(0, rows)
                bias = None if bias is None else bias.index_select(0, rows)
        if bias is not None:
            y = y + bias.to(y.dtype)
        if task_a is not None and task_b is not None:
            y = adapted(y, x, task_a, task_b, self.task_scale)
        return y

"""L4Q: add the LoRA product to the frozen weight, fake-quantise the sum, train factors and steps together.

``W_q = dequantize(quantize(W0 + alpha * B @ A))`` and ``Y = X @ W_q^T``. Order is the method: merge, then
quantise; nothing of A or B is applied to activations, so inference is one integer matrix. Gradients are
straight-through with the clipping mask taken on the unrounded code.

Source: L4Q, arXiv 2402.04902 (ACL 2025), section 3. The paper's s is ``scale``, its b is ``offset``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import grid, l4q_rows
from quant.exceptions import QuantError, ShapeError
from quant.linear import PackedMatrix, weight_rows
from quant.lora import fresh_factors
from quant.rebuild import add_product_, autocast_input, check_input, row_chunks, without_autocast
from quant.storage import PackedShape

MIN_TRAINED_STEP = 6.2e-5
"""Absolute floor of a trained step: just above the smallest normal fp16, in which checkpoints store steps.

A step below it would lose precision when written and, at zero or less, would flip or divide by zero.
"""


_BASE = 11
"""Operands of `L4QFunction` before the frozen weight's tensors."""


@dataclass(frozen=True)
class _Stored:
    """How the frozen weight is kept: packed in `shape` as buffers of these `names`, or as one dense tensor."""

    shape: PackedShape | None
    names: tuple[str, ...]

    def rows(self, tensors: Sequence[Tensor], rows: slice) -> Tensor:
        """Rows of W0, [rows, in]."""
        if self.shape is None:
            return tensors[0][rows]
        return weight_rows(dict(zip(self.names, tensors, strict=True)), self.shape, rows)


def _stored(weight: Tensor | PackedMatrix) -> tuple[_Stored, tuple[Tensor, ...], tuple[int, int]]:
    """How the frozen weight is kept, its tensors, and [out, in]."""
    if isinstance(weight, Tensor):
        return _Stored(None, ()), (weight,), (weight.shape[0], weight.shape[1])
    if weight.shape.transposed:
        raise ShapeError("a frozen weight is rebuilt by its outputs; pack it as [out, in], not transposed")
    buffers = weight.frozen()
    sides = (weight.shape.out_features, weight.shape.in_features)
    return _Stored(weight.shape, tuple(buffers)), tuple(buffers.values()), sides


def _offset(scale: Tensor, offset: Tensor | None, half: bool, rows: slice) -> Tensor | None:
    """What code 0 of these rows' groups stands for; None is 0."""
    if half:
        return grid.half_step(scale[rows])
    return None if offset is None else offset[rows]


class L4QFunction(torch.autograd.Function):
    """``Y = X @ W_q^T`` that keeps X and references to its operands, and nothing of size [out, in]; a dense W0 that
    requires a gradient gets that of the sum.

    Forward and backward rebuild the weight in row chunks, in fp32 (fp64 when the steps are fp64); the
    products with activations run in X's dtype. Call it through ``l4q_linear``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        half: bool,
        alpha: float,
        bits: int,
        row_chunk: int | None,
        fused: bool,
        stored: _Stored,
        *base: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, lora_a, lora_b, scale, offset, *base)
        ctx.half, ctx.alpha, ctx.bits, ctx.row_chunk, ctx.stored = half, alpha, bits, row_chunk, stored
        ctx.fused = fused
        rows_total, columns = len(lora_b), lora_a.shape[1]
        y = x.new_empty(*x.shape[:-1], rows_total)
        flat_x, flat_y = x.reshape(-1, columns), y.view(-1, rows_total)
        with without_autocast(x):
            for rows in row_chunks(rows_total, columns, row_chunk):
                frozen, at = stored.rows(base, rows), _offset(scale, offset, half, rows)
                by = l4q_rows.chosen(frozen, lora_a, scale, fused)
                w_q = by.rebuild(frozen, lora_a, lora_b[rows], scale[rows], at, alpha, bits)
                torch.mm(flat_x, w_q.to(x.dtype).t(), out=flat_y[:, rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, lora_a, lora_b, scale, offset, *base = ctx.saved_tensors
        alpha, bits, dtype = ctx.alpha, ctx.bits, scale.dtype
        rows_total, columns = len(lora_b), lora_a.shape[1]
        flat_x, flat_grad = x.reshape(-1, columns), grad_y.reshape(-1, rows_total)
        grad_x = torch.zeros_like(flat_x, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_a, grad_b = torch.zeros_like(lora_a, dtype=dtype), torch.empty_like(lora_b, dtype=dtype)
        grad_scale = torch.empty_like(scale)
        grad_offset = None if offset is None else torch.empty_like(offset)
        grad_base = torch.empty_like(base[0]) if ctx.needs_input_grad[_BASE] else None
        with without_autocast(x):
            for rows in row_chunks(rows_total, columns, ctx.row_chunk):
                grad_w = (flat_grad[:, rows].t() @ flat_x).to(dtype)
                frozen, at = ctx.stored.rows(base, rows), _offset(scale, offset, ctx.half, rows)
                by = l4q_rows.chosen(frozen, lora_a, scale, ctx.fused)
                w_q, grad_merged, grad_scale[rows], grad_at = by.pull_back(
                    *(grad_w, frozen, lora_a, lora_b[rows], scale[rows], at, alpha, bits), weight=grad_x is not None
                )
                if grad_x is not None:
                    add_product_(grad_x, flat_grad[:, rows], w_q.to(x.dtype))
                    del w_q
                if grad_offset is not None:
                    grad_offset[rows] = grad_at
                elif grad_at is not None:
                    grad_scale[rows] += 0.5 * grad_at
                torch.mm(grad_merged, lora_a.to(dtype).t(), out=grad_b[rows])
                grad_a.addmm_(lora_b[rows].to(dtype).t(), grad_merged)
                if grad_base is not None:
                    grad_base[rows] = grad_merged
        return (
            None if grad_x is None else grad_x.to(x.dtype).view_as(x),
            grad_a.mul_(alpha).to(lora_a.dtype),
            grad_b.mul_(alpha).to(lora_b.dtype),
            grad_scale,
            grad_offset,
            *(None,) * (_BASE - 5),
            grad_base,
            *(None,) * (len(base) - 1),
        )


def l4q_linear(
    x: Tensor,
    weight: Tensor | PackedMatrix,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    alpha: float,
    bits: int,
    group_size: int,
    half: bool = False,
    bias: Tensor | None = None,
    row_chunk: int | None = None,
    fused: bool = True,
) -> Tensor:
    """Linear map with the fake-quantised sum ``W0 + alpha * B @ A``.

    Args:
        x: [..., in]; its dtype is the compute dtype of the products with activations.
        weight: [out, in], frozen, any float dtype; or packed and not transposed, rebuilt in the same chunks.
        lora_a: [rank, in]. lora_b: [out, rank]. ``alpha`` multiplies ``B @ A`` as is, any 1/rank folded in.
        scale: [out, in // group_size], fp32 or fp64, positive. offset: like scale, or None for a frozen 0.
        half: the offset is half a step, whatever the step, and the step's gradient has its share; excludes ``offset``.
        row_chunk: weight rows rebuilt at once; default about 2**20 weights.
        fused: on CUDA, with Triton, what happens to a weight between the products is one kernel where that fits
            (``quant.triton_l4q``); False: plain torch, as on the CPU.

    Returns:
        [..., out] in x's dtype (autocast's dtype under autocast).

    Raises:
        ShapeError: an operand does not fit. QuantError: scale is not fp32 or fp64, or there are two offsets.

    Peak bytes beyond the result: forward 13 x row_chunk x in, backward 26 x row_chunk x in plus an fp32
    gradient of x; with a packed weight its scales in fp32 and its factors in fp64 beside these. FLOPs: 6 x tokens x out
    x in, like full fine-tuning and 1.5 x LoRA.
    """
    stored, base, (rows, columns) = _stored(weight)
    check_input(x, columns)
    groups = grid.group_count(columns, group_size)
    expected = {"lora_a": (lora_a, (lora_b.shape[-1], columns)), "lora_b": (lora_b, (rows, lora_a.shape[0]))}
    expected["scale"] = (scale, (rows, groups))
    if offset is not None:
        expected["offset"] = (offset, (rows, groups))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{name} must be {shape} for a weight {(rows, columns)}, found {tuple(tensor.shape)}")
    if half and offset is not None:
        raise QuantError("an offset of half a step is the step's own; leave offset out")
    if scale.dtype not in (torch.float32, torch.float64):
        raise QuantError(f"steps train in fp32 (bf16 loses the updates); found scale in {scale.dtype}")
    x = autocast_input(x)
    y: Tensor = L4QFunction.apply(  # type: ignore[no-untyped-call]
        x, lora_a, lora_b, scale, offset, half, alpha, bits, row_chunk, fused, stored, *base
    )
    return y if bias is None else y + bias.to(y.dtype)


class L4QLinear(nn.Module):
    """A linear layer trained with L4Q: frozen weight and bias, trainable factors and steps (and offsets).

    Trainable values: ``rank * (in + out) + out * in / group_size``, twice the last term with
    a trained offset. All are fp32 masters whatever the weight's dtype: near a step of 0.008 the bf16 spacing
    is 6e-5, larger than an update.

    Args:
        weight: [out, in], any float dtype, or packed and not transposed; kept by reference, never copied, never
            trained.
        bias: [out] or None, frozen.
        rank, alpha: rank of the factors; ``alpha`` multiplies ``B @ A`` as is (pass ``lora_alpha / rank`` for
            the LoRA convention).
        generator: draws ``lora_a``, Kaiming-uniform with a = sqrt(5); unused with a warm start.
        offset: what code 0 stands for, see ``quant.grid.OffsetKind``.
        init: first steps, and offsets if they are trained, see ``quant.grid.init_grid``.
        steps: first steps, and offsets or None, chosen before; they replace those of ``init``.
        warm_start: ``(A [rank, in], B [out, rank])`` copied into the factors, replacing ``rank`` by theirs.
            Initial steps are then chosen for ``W0 + alpha * B @ A``, the matrix that is quantised at step 0,
            not for W0.
        row_chunk, fused: see ``l4q_linear``; fixed values for the life of the layer keep every rebuild bitwise
            equal.

    Raises:
        ShapeError, NonFiniteError, QuantError: as in ``l4q_linear`` and ``grid.init_grid``.

    Peak bytes of construction: about 5 x out x in in fp32 (8 x with "mse").
    """

    offset: Tensor | None

    def __init__(
        self,
        weight: Tensor | PackedMatrix,
        bias: Tensor | None,
        *,
        bits: int,
        group_size: int,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        offset: grid.OffsetKind = "zero",
        init: grid.StepMethod = "l4q",
        steps: tuple[Tensor, Tensor | None] | None = None,
        warm_start: tuple[Tensor, Tensor] | None = None,
        row_chunk: int | None = None,
        fused: bool = True,
    ) -> None:
        super().__init__()
        stored, base, (self.out_features, self.in_features) = _stored(weight)
        self.bits, self.group_size, self.alpha, self.row_chunk = bits, group_size, alpha, row_chunk
        self.fused = fused
        self.weight = nn.Parameter(weight.detach(), requires_grad=False) if isinstance(weight, Tensor) else weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        lora_a, lora_b = warm_start or fresh_factors(self.out_features, self.in_features, rank, generator)
        self.rank = lora_a.shape[0]
        if lora_a.shape != (self.rank, self.in_features) or lora_b.shape != (self.out_features, self.rank):
            raise ShapeError(
                f"warm start must be ([rank, {self.in_features}], [{self.out_features}, rank]), "
                f"found {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
            )
        self.lora_a = nn.Parameter(lora_a.detach().to(base[0].device, torch.float32, copy=True))
        self.lora_b = nn.Parameter(lora_b.detach().to(base[0].device, torch.float32, copy=True))
        if steps is None:
            with torch.no_grad():
                whole = stored.rows(base, slice(0, self.out_features)).float()
                merged = torch.addmm(whole, self.lora_b, self.lora_a, alpha=alpha)
            steps = grid.init_grid(merged, bits, group_size, method=init, offset=offset)
        scale, first = steps
        self.half_offset = offset == "half"
        self.scale, self.offset = nn.Parameter(scale), None if first is None else nn.Parameter(first)
        self.clamp_steps_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] with the fake-quantised weight; see ``l4q_linear``."""
        return l4q_linear(
            x,
            self.weight,
            self.lora_a,
            self.lora_b,
            self.scale,
            self.offset,
            alpha=self.alpha,
            bits=self.bits,
            group_size=self.group_size,
            half=self.half_offset,
            bias=self.bias,
            row_chunk=self.row_chunk,
            fused=self.fused,
        )

    def tune(self) -> None:
        """Let gradients reach factors, steps and trained offsets."""
        self.lora_a.requires_grad_()
        self.lora_b.requires_grad_()
        self.tune_steps()

    def tune_steps(self) -> None:
        """Let gradients reach steps and trained offsets."""
        self.scale.requires_grad_()
        if self.offset is not None:
            self.offset.requires_grad_()

    @torch.no_grad()
    def clamp_steps_(self) -> int:
        """Raise every step below ``MIN_TRAINED_STEP`` to it, and say how many; call after each optimiser step."""
        low = int((self.scale < MIN_TRAINED_STEP).sum())
        self.scale.clamp_(min=MIN_TRAINED_STEP)
        return low

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The integers forward uses now, bit for bit: codes int8 [out, in], scale, and the offset of every group, half
        a step or trained, or None where it is 0 (copies).

        Peak bytes beyond the codes: 13 x row_chunk x in.
        """
        stored, base, sides = _stored(self.weight)
        codes = torch.empty(sides, dtype=torch.int8, device=self.scale.device)
        with without_autocast(codes):
            for rows in row_chunks(self.out_features, self.in_features, self.row_chunk):
                frozen, at = stored.rows(base, rows), _offset(self.scale, self.offset, self.half_offset, rows)
                by = l4q_rows.chosen(frozen, self.lora_a, self.scale, self.fused)
                codes[rows] = by.codes(
                    frozen, self.lora_a, self.lora_b[rows], self.scale[rows], at, self.alpha, self.bits
                )
        offset = _offset(self.scale, self.offset, self.half_offset, slice(0, self.out_features))
        return codes, self.scale.detach().clone(), None if offset is None else offset.detach().clone()

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weight forward uses now, fp32 [out, in], bitwise. Peak bytes: 5 x out x in with the result."""
        return grid.dequantize(*self.quantized())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, rank={self.rank}, alpha={self.alpha}"
        )

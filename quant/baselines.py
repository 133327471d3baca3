"""The methods that L4Q is measured beside: LSQ, QAT-LoRA, QA-LoRA, and LoRA on dense weights.

They read the integers' one definition, ``quant.grid``: what a layer computes while it trains is, to the bit, what its
codes, steps and offsets stand for afterwards. In QAT-LoRA the factors stay beside these.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant import grid
from quant.exceptions import QuantError, ShapeError
from quant.fakequant import L4QLinear
from quant.linear import PackedMatrix
from quant.lora import adapted, fresh_factors
from quant.pack import pack, unpack
from quant.rebuild import autocast_input, check_input, row_chunks, without_autocast


class FakeQuantLinear(L4QLinear):
    """A fake-quantised weight with learned steps (and offsets) and no factors under the rounding.

    With ``weight`` frozen it is the base of QAT-LoRA. With an fp32 ``weight`` that requires a gradient it is LSQ
    (arXiv 1902.08153), straight through where the weight is in range; LSQ's gradient scale, which Adam cancels, is left
    out. Peak bytes of LSQ: the weight in fp32, its gradient and what the optimiser keeps of it, 16 a weight with Adam,
    and the chunks of ``l4q_linear``; nothing of [out, in] outlives a pass but the gradient.

    Args:
        weight: [out, in], or packed and not transposed. bias: [out] or None, frozen.
        steps: first steps fp32 [out, in // group_size], and offsets of that shape where these are trained, or None.
        offset: what code 0 stands for, see ``quant.grid.OffsetKind``.

    Raises as ``L4QLinear``.
    """

    def __init__(
        self,
        weight: Tensor | PackedMatrix,
        bias: Tensor | None,
        *,
        bits: int,
        group_size: int,
        steps: tuple[Tensor, Tensor | None],
        offset: grid.OffsetKind = "zero",
        row_chunk: int | None = None,
    ) -> None:
        rows, groups = steps[0].shape
        none = steps[0].new_zeros(0, groups * group_size), steps[0].new_zeros(rows, 0)
        super().__init__(
            weight,
            bias,
            bits=bits,
            group_size=group_size,
            rank=0,
            alpha=0.0,
            generator=torch.Generator(),
            offset=offset,
            steps=steps,
            warm_start=none,
            row_chunk=row_chunk,
        )

    def tune(self) -> None:
        """Let gradients reach the weight, steps and trained offsets: LSQ. Raises QuantError for a packed weight."""
        if not isinstance(self.weight, nn.Parameter):
            raise QuantError("a packed weight cannot be trained; keep it dense")
        self.weight.requires_grad_()
        self.tune_steps()


class LoRALinear(nn.Module):
    """``base(x)`` plus an adapter on the activations, with the adapter's side of `quant.linear.PackedLinear`.

    On a dense base it is LoRA, on a `FakeQuantLinear` QAT-LoRA: what is rounded knows nothing of the factors, which the
    result keeps in floating point. Peak bytes beyond the base's: the product's, [..., out].
    """

    task_a: nn.Parameter | None
    task_b: nn.Parameter | None

    def __init__(self, base: nn.Linear | FakeQuantLinear) -> None:
        super().__init__()
        self.base = base
        self.register_parameter("task_a", None)
        self.register_parameter("task_b", None)
        self.task_scale = 0.0

    def attach_adapter(self, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Add ``alpha / rank * (x @ task_a^T) @ task_b^T``, nothing at first; see ``PackedLinear.attach_adapter``.

        Raises ShapeError for a rank below 1, QuantError where an adapter is attached already."""
        lora_a, lora_b = fresh_factors(self.base.out_features, self.base.in_features, rank, generator)
        self.set_adapter(lora_a, lora_b, alpha / rank)

    def set_adapter(self, lora_a: Tensor, lora_b: Tensor, strength: float) -> None:
        """Add ``strength * (x @ A^T) @ B^T``, A [rank, in] and B [out, rank] as fp32 copies.

        Raises ShapeError for factors that do not fit, QuantError where an adapter is attached already."""
        if self.task_a is not None:
            raise QuantError("an adapter is already attached to this layer")
        sides = self.base.in_features, self.base.out_features
        if (lora_a.shape[1], lora_b.shape[0]) != sides or lora_a.shape[0] != lora_b.shape[1]:
            raise ShapeError(
                f"factors must be [rank, {sides[0]}] and [{sides[1]}, rank], found {list(lora_a.shape)} and "
                f"{list(lora_b.shape)}"
            )
        device = self.base.weight.device if isinstance(self.base, nn.Linear) else self.base.scale.device
        self.task_a = nn.Parameter(lora_a.detach().to(device, torch.float32, copy=True))
        self.task_b = nn.Parameter(lora_b.detach().to(device, torch.float32, copy=True))
        self.task_scale = strength

    def tune(self) -> None:
        """Let gradients reach the factors and, of a base that is rounded, its steps and trained offsets."""
        for factor in (self.task_a, self.task_b):
            if factor is not None:
                factor.requires_grad_()
        if isinstance(self.base, FakeQuantLinear):
            self.base.tune_steps()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in x's dtype (autocast's dtype under autocast)."""
        x = autocast_input(x)
        y: Tensor = self.base(x)
        if self.task_a is None or self.task_b is None:
            return y
        return adapted(y, x, self.task_a, self.task_b, self.task_scale)


class _OffsetMap(torch.autograd.Function):
    """``X @ W^T`` of fixed codes and steps, differentiable in X and the offsets; keeps the sums of X over each group,
    not X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor, scale: Tensor, codes: Tensor, bits: int) -> Tensor:
        rows, groups = scale.shape
        flat_x = x.reshape(-1, x.shape[-1])
        pooled = flat_x.view(len(flat_x), groups, -1).sum(-1)
        ctx.save_for_backward(pooled, offset, scale, codes)
        ctx.bits, ctx.sides = bits, (rows, x.shape[-1])
        flat_y = x.new_empty(len(flat_x), rows)
        for chunk in row_chunks(*ctx.sides):
            flat_y[:, chunk] = flat_x @ _weight(codes, scale, offset, bits, chunk, x.shape[-1]).to(x.dtype).t()
        return flat_y.view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        pooled, offset, scale, codes = ctx.saved_tensors
        rows, columns = ctx.sides
        flat_grad = grad_y.reshape(-1, rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = flat_grad.new_zeros(len(flat_grad), columns, dtype=scale.dtype)
            with without_autocast(grad_y):
                for chunk in row_chunks(rows, columns):
                    weight = _weight(codes, scale, offset, ctx.bits, chunk, columns)
                    grad_x += flat_grad[:, chunk] @ weight.to(flat_grad.dtype)
            grad_x = grad_x.to(grad_y.dtype).view(*grad_y.shape[:-1], columns)
        # All weights of a group share its offset: what each of them is due adds up to the product with the sums of X.
        return grad_x, (flat_grad.t() @ pooled).to(offset.dtype), None, None, None


def _weight(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, rows: slice, columns: int) -> Tensor:
    """Rows of the weight, [rows, columns] in the steps' dtype."""
    return grid.dequantize(grid.to_signed(unpack(codes[rows], bits, columns), bits), scale[rows], offset[rows])


class QALoRALinear(nn.Module):
    """QA-LoRA (arXiv 2309.14717): codes and steps are fixed, an adapter sees each input group's sum.

    A group of one row then gets one number, ``alpha * (B @ A)[o, k]``, which is added to the group's offset: the result
    is integers with real offsets and no adapter, and that is how it is computed while it trains. Pooling is the sum, as
    in the paper's algorithm; with the mean ``alpha`` would stand for its product with the group size. A is
    [rank, groups], in // groups times smaller than LoRA's: the published comparison doubles the rank.

    Args:
        codes: int8 [out, in] on the grid of ``bits``, kept packed. scale: fp32 (or fp64) [out, groups].
        offset: like scale, what code 0 stands for before training; None is 0. bias: [out] or None, frozen.
        rank, alpha: of the factors; ``alpha`` multiplies ``B @ A`` as is.
        generator: draws ``lora_a``, Kaiming-uniform with a = sqrt(5); ``lora_b`` is zeros.

    Raises ShapeError for operands that do not fit or a rank below 1.

    Peak bytes beyond the result: 8 x 2**20 and an fp32 gradient of x; between forward and backward
    4 x (tokens x groups + out x groups).
    """

    scale: Tensor
    first_offset: Tensor

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        bias: Tensor | None,
        *,
        bits: int,
        rank: int,
        alpha: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        (self.out_features, self.in_features), self.bits, self.alpha = codes.shape, bits, alpha
        rows, groups = scale.shape
        first = torch.zeros_like(scale) if offset is None else offset
        if rows != self.out_features or not groups or self.in_features % groups or first.shape != scale.shape:
            raise ShapeError(
                f"scale and offset must be [{self.out_features}, groups] with groups dividing {self.in_features}, "
                f"found {list(scale.shape)} and {list(first.shape)}"
            )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("codes", pack(grid.to_unsigned(codes, bits), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("first_offset", first)
        lora_a, lora_b = fresh_factors(rows, groups, rank, generator)
        self.lora_a, self.lora_b = nn.Parameter(lora_a.to(scale)), nn.Parameter(lora_b.to(scale))

    def tune(self) -> None:
        """Let gradients reach the factors, and so the offsets."""
        self.lora_a.requires_grad_()
        self.lora_b.requires_grad_()

    def _offset(self) -> Tensor:
        """What code 0 stands for now, [out, groups]."""
        with without_autocast(self.scale):
            return torch.addmm(self.first_offset, self.lora_b, self.lora_a, alpha=self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype (autocast's dtype under autocast)."""
        check_input(x, self.in_features)
        x = autocast_input(x)
        with without_autocast(x):
            y: Tensor = _OffsetMap.apply(  # type: ignore[no-untyped-call]
                x, self._offset(), self.scale, self.get_buffer("codes"), self.bits
            )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def quantized(self) -> tuple[Tensor, Tensor, Tensor]:
        """The integers forward uses now, bit for bit: codes int8 [out, in], scale, and offset (copies)."""
        codes = grid.to_signed(unpack(self.get_buffer("codes"), self.bits, self.in_features), self.bits)
        return codes, self.scale.clone(), self._offset().detach()

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weight forward uses now, [out, in], bitwise. Peak bytes: twice the result."""
        return grid.dequantize(*self.quantized())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"groups={self.scale.shape[1]}, rank={len(self.lora_a)}, alpha={self.alpha}"
        )

"""A packed map whose codes stay while its scales, levels and low-rank factors are tuned."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from quant.blockwise import BlockQuantized, dequantize
from quant.buffers import Factors, first_level_scales, packed_buffers, zero_points
from quant.linear import Buffers
from quant.lowrank import dequantize_factors, store_factors
from quant.pack import unpack
from quant.rebuild import add_product_, check_input, row_chunks
from quant.scales import quantize_scales
from quant.storage import PackedShape


class _TunableMap(torch.autograd.Function):
    """``x @ Q^T``, differentiable in x, scales and levels; Q is rebuilt by row chunks, in forward and in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, levels: Tensor, codes: Tensor, zero: Tensor | None, shape: PackedShape
    ) -> Tensor:
        ctx.save_for_backward(x, scale, levels, codes, zero)
        ctx.shape = shape
        y = x.new_zeros(len(x), shape.out_features)
        for rows, chunk in _chunks(codes, shape):
            weight = dequantize(chunk, scale[rows], levels, None if zero is None else zero[rows])
            if shape.transposed:
                add_product_(y, x[:, rows], weight)
            else:
                add_product_(y[:, rows], x, weight.t())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, levels, codes, zero = ctx.saved_tensors
        shape: PackedShape = ctx.shape
        grad_x, grad_scale, grad_levels = torch.zeros_like(x), torch.empty_like(scale), torch.zeros_like(levels)
        ones = torch.ones_like(scale)
        for rows, chunk in _chunks(codes, shape):
            step = dequantize(chunk, ones[rows], levels, None if zero is None else zero[rows])
            spread = scale[rows].repeat_interleave(shape.choice.block_size, dim=1)
            weight = step * spread
            if shape.transposed:
                add_product_(grad_x[:, rows], grad_y, weight.t())
                grad_weight = x[:, rows].t() @ grad_y
            else:
                add_product_(grad_x, grad_y[:, rows], weight)
                grad_weight = grad_y[:, rows].t() @ x
            grad_scale[rows] = (grad_weight * step).view(len(chunk), -1, shape.choice.block_size).sum(dim=2)
            by_level = torch.bincount(chunk.flatten(), (grad_weight * spread).flatten(), minlength=len(levels))
            grad_levels += by_level.to(levels.dtype)
        return grad_x, grad_scale, grad_levels, None, None, None


class TunableLinear(nn.Module):
    """The function of a ``PackedLinear`` in fp32, with trainable changes that start at zero.

    Parameters, all relative so that one learning rate suits them: ``scale_change`` [rows, blocks], a factor 1 + change
    of each block's scale; ``level_change`` [2**bits], added to the levels, which are of order one (integer grids keep
    theirs); with a low-rank part ``left_change`` [out, rank] and ``right_change`` [rank, in], in units of the factor's
    root mean square. Codes and zero points stay. ApiQ (arXiv 2402.05147) tunes clipping ranges and factors alike.

    Peak bytes beside the buffers: two fp32 copies of the scales and factors; forward and backward about 30 x 2**20 for
    the chunk being rebuilt.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    left: Tensor
    right: Tensor

    def __init__(self, shape: PackedShape, buffers: Buffers) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("codes", buffers["codes"])
        self.register_buffer("levels", buffers["levels"])
        self.register_buffer("scale", first_level_scales(buffers, shape))
        self.register_buffer("zero", zero_points(buffers, shape))
        self.register_buffer("bias", buffers.get("bias"))
        self.scale_change = nn.Parameter(torch.zeros_like(self.scale))
        self.level_change = nn.Parameter(torch.zeros_like(self.levels))
        left, right = dequantize_factors(
            buffers["lowrank_left"], buffers["lowrank_right"], buffers.get("lowrank_scale")
        )
        self.register_buffer("left", left)
        self.register_buffer("right", right)
        self.left_change = nn.Parameter(torch.zeros_like(left))
        self.right_change = nn.Parameter(torch.zeros_like(right))
        self.tune()

    def tune(self) -> None:
        """Let gradients reach what this map can change."""
        self.scale_change.requires_grad_(True)
        # Integer grids are their levels.
        self.level_change.requires_grad_(self.shape.choice.grid in ("nf", "lloyd"))
        for change in (self.left_change, self.right_change):
            change.requires_grad_(self.shape.choice.rank > 0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in fp32."""
        check_input(x, self.shape.in_features)
        flat = x.reshape(-1, x.shape[-1]).float()
        y: Tensor = _TunableMap.apply(  # type: ignore[no-untyped-call]
            flat, self._scale(), self.levels + self.level_change, self.codes, self.zero, self.shape
        )
        if self.shape.choice.rank:
            left, right = self._factors()
            y = y + (flat @ right.t()) @ left.t()
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    @torch.no_grad()
    def packed(self) -> dict[str, Tensor]:
        """Every tensor of ``shape.buffers()`` as tuned: scales and factors rounded to their stored form, codes
        renumbered where levels have changed places."""
        choice = self.shape.choice
        levels, order = (self.levels + self.level_change).sort(stable=True)
        codes = unpack(self.codes, choice.bits, self.shape.columns)
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            codes = order.argsort().to(torch.uint8)[codes.int()]
        quantized = BlockQuantized(codes, levels, quantize_scales(self._scale(), choice), self.zero)
        factors: Factors = store_factors(*self._factors(), choice.factor_dtype)
        return packed_buffers(quantized, factors, self.shape, self.bias)

    def _scale(self) -> Tensor:
        return self.scale * (1 + self.scale_change)

    def _factors(self) -> tuple[Tensor, Tensor]:
        return _changed(self.left, self.left_change), _changed(self.right, self.right_change)


def _changed(value: Tensor, change: Tensor) -> Tensor:
    return value + value.square().mean().sqrt() * change if value.numel() else value


def _chunks(codes: Tensor, shape: PackedShape) -> Iterator[tuple[slice, Tensor]]:
    for rows in row_chunks(shape.rows, shape.columns):
        yield rows, unpack(codes[rows], shape.choice.bits, shape.columns)

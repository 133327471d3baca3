"""What L4Q does to some rows of a weight, between the matrix products: rebuild them, and pull their gradient back.

Operands, the same everywhere: `frozen` rows of W0 [rows, in]; `lora_a` [rank, in] and `lora_b` [rows, rank]; `scale`
[rows, groups]; `offset` like it, what code 0 stands for, or None for 0; `alpha` multiplies B A. `quant.triton_l4q` has
the same three functions as one kernel each.
"""

import os
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quant import grid


def chosen(frozen: Tensor, lora_a: Tensor, scale: Tensor, fused: bool) -> Any:
    """What has `codes`, `rebuild` and `pull_back` for these rows: this module or, if that is wanted, Triton's on CUDA
    where it fits."""
    # Triton's interpreter, in which the kernels are tested, takes tensors of the CPU.
    compiled = frozen.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if fused and compiled and _has_triton():
        from quant import triton_l4q

        if triton_l4q.fits(frozen, lora_a, scale):
            return triton_l4q
    return sys.modules[__name__]


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _real(frozen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor, offset: Tensor | None, alpha: float) -> Tensor:
    """The unrounded codes [rows, groups, in // groups] in scale's dtype."""
    dtype = scale.dtype
    merged = torch.addmm(frozen.to(dtype), lora_b.to(dtype), lora_a.to(dtype), alpha=alpha)
    return grid.normalise(merged, scale, offset)


def codes(
    frozen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor, offset: Tensor | None, alpha: float, bits: int
) -> Tensor:
    """int8 codes [rows, in]. Peak bytes: 13 a weight."""
    found = grid.round_codes(_real(frozen, lora_a, lora_b, scale, offset, alpha), bits)
    return found.to(torch.int8).view(frozen.shape)


def rebuild(
    frozen: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor, offset: Tensor | None, alpha: float, bits: int
) -> Tensor:
    """W_q [rows, in] in scale's dtype: what the codes stand for, to the bit. Peak bytes: 12 a weight."""
    found = grid.round_codes(_real(frozen, lora_a, lora_b, scale, offset, alpha), bits)
    return grid.dequantize(found.view(frozen.shape), scale, offset)


def pull_back(
    grad: Tensor,
    frozen: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    alpha: float,
    bits: int,
    *,
    weight: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """From the gradient of W_q [rows, in], which is used up, to (W_q again if `weight`, the gradient of the sum, of the
    steps, of the offsets if there are some).

    d W_q / d scale is q - w in range and q (QN or QP) where clipped; d W_q / d offset 0 and 1. Peak bytes: 24 a weight.
    """
    real = _real(frozen, lora_a, lora_b, scale, offset, alpha)
    found = grid.round_codes(real, bits)
    w_q = grid.dequantize(found.view(frozen.shape), scale, offset) if weight else None
    grouped = grad.view_as(real)
    residual = found.sub_(grid.where_in_range(real, real, bits))
    grad_scale = residual.mul_(grouped).sum(-1)
    grad_real = grid.where_in_range(grouped, real, bits)
    grad_offset = None if offset is None else grouped.sub_(grad_real).sum(-1)
    return w_q, grad_real.view_as(grad), grad_scale, grad_offset

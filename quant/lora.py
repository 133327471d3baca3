"""What every layer with a LoRA adapter shares: how factors begin, and what they add (LoRA, arXiv 2106.09685)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quant.exceptions import ShapeError


def fresh_factors(rows: int, columns: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors that add nothing yet, fp32: A [rank, columns] Kaiming-uniform (a = sqrt 5), drawn where the generator
    lives, B [rows, rank] zeros. Raises ShapeError for a rank below 1."""
    if rank < 1:
        raise ShapeError(f"adapter rank must be at least 1, found {rank}")
    lora_a = torch.empty(rank, columns, dtype=torch.float32, device=generator.device)
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5), generator=generator)
    return lora_a, torch.zeros(rows, rank, dtype=torch.float32, device=generator.device)


def adapted(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, strength: float) -> Tensor:
    """``y + strength * (x @ A^T) @ B^T``, the product in x's dtype: x [..., in], y [..., out], A [rank, in], B
    [out, rank]."""
    return y + strength * F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))

"""Seeded samples and short cuts that the numeric tests of the quantiser share."""

import math
from dataclasses import replace

import torch

from quant import blockwise, scales
from quant.storage import PackedShape


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=generator(seed), dtype=dtype)


def scales_of(quantized, choice):
    return scales.scales(quantized.scales, choice)


def rebuilt(weight, choice):
    return blockwise.rebuild(blockwise.quantize(weight, choice), choice)


def stored_bits(rows, columns, choice):
    """Bits of everything that Q of a [rows, columns] matrix takes on disk, its levels apart."""
    buffers = PackedShape(columns, rows, replace(choice, rank=0), transposed=False).buffers()
    sizes = {name: getattr(torch, dtype).itemsize * math.prod(shape) for name, (dtype, shape) in buffers.items()}
    return 8 * (sum(sizes.values()) - sizes["levels"] - sizes.get("lowrank_scale", 0))


def relative(error, weight):
    return (error.double().norm() / weight.double().norm()).item()

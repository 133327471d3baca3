"""Seeded samples and short cuts that the numeric tests of the quantiser share."""

import torch

from quant.blockwise import dequantize, quantize, scales


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=generator(seed), dtype=dtype)


def scales_of(quantized, fmt):
    return scales(quantized.scale_codes, quantized.scale_max, quantized.scale_offset, fmt)


def rebuilt(weight, fmt):
    quantized = quantize(weight, fmt)
    return dequantize(quantized.codes, scales_of(quantized, fmt), fmt.bits)


def relative(error, weight):
    return (error.double().norm() / weight.double().norm()).item()

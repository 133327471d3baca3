"""Slow float64 twins of the numerics in this package, written for clarity; tests compare against them."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from quant.blockwise import BlockFormat
from quant.storage import packed_columns


def normal_float(bits: int) -> Tensor:
    """NormalFloat levels, float64 [2**bits], from the standard library's normal quantile."""
    quantile, p_max, half = NormalDist().inv_cdf, 0.9677083, 2 ** (bits - 1)
    low = [quantile(1 - p_max + k * (p_max - 0.5) / (half - 1)) for k in range(half - 1)]
    high = [quantile(0.5 + k * (p_max - 0.5) / half) for k in range(half + 1)]
    return torch.tensor([level / quantile(p_max) for level in low + high], dtype=torch.float64)


def encode(normalised: Tensor, codebook: Tensor) -> Tensor:
    """Nearest level by full comparison, the lower of two at equal distance: uint8, any shape."""
    distance = (normalised.double().unsqueeze(-1) - codebook.double()).abs()
    nearest = distance == distance.amin(dim=-1, keepdim=True)
    return nearest.to(torch.uint8).argmax(dim=-1).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Bit by bit in Python integers: uint8 [rows, columns] to int32 [rows, words]."""
    rows, columns = codes.shape
    words = [[0] * packed_columns(columns, bits) for _ in range(rows)]
    for row, line in enumerate(codes.tolist()):
        for column, code in enumerate(line):
            for bit in range(bits):
                if bits == 3:
                    word, position = 3 * (column // 32) + bit, column % 32
                else:
                    word, position = divmod(column * bits + bit, 32)
                words[row][word] |= (code >> bit & 1) << position
    signed = [[word - 2**32 if word >= 2**31 else word for word in line] for line in words]
    return torch.tensor(signed, dtype=torch.int32).view(rows, -1)


def quantize(weight: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [rows, columns], scale codes uint8 [rows, blocks], rebuilt scales float64 [rows, blocks]).

    Only the cast of the superblock maxima leaves float64, because it is part of the format.
    """
    rows, columns = weight.shape
    blocks = weight.double().reshape(-1, fmt.block_size)
    absmax = blocks.abs().amax(dim=1)
    offset = absmax.min()
    per_superblock = fmt.blocks_per_superblock(columns)
    largest = 2**fmt.scale_bits - 1
    scale_codes, scale = torch.zeros_like(absmax), torch.zeros_like(absmax)
    for start in range(0, len(absmax), per_superblock):
        part = slice(start, start + per_superblock)
        above = absmax[part] - offset
        maximum = above.max().float().to(fmt.scale_dtype).double()
        if maximum > 2.0**-24:
            scale_codes[part] = (above * largest / maximum).round().clamp(0, largest)
        scale[part] = offset + scale_codes[part] * maximum / largest
    codes = torch.full_like(blocks, 2 ** (fmt.bits - 1) - 1, dtype=torch.uint8)
    for index, block in enumerate(blocks):
        if scale[index] > 0:
            codes[index] = encode(block / scale[index], normal_float(fmt.bits))
    return codes.view(rows, columns), scale_codes.to(torch.uint8).view(rows, -1), scale.view(rows, -1)


def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Level times scale in float64 [rows, columns]."""
    repeated = scale.double().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    return normal_float(bits)[codes.long()] * repeated


def weighted_lowrank(matrix: Tensor, rank: int, row_weight: Tensor, column_weight: Tensor) -> Tensor:
    """Best rank-`rank` approximation [m, n] under positive diagonal weights, by full SVD in float64."""
    rows, columns = row_weight.double()[:, None], column_weight.double()[None]
    u, s, vh = torch.linalg.svd(matrix.double() * rows * columns, full_matrices=False)
    return torch.div((u[:, :rank] * s[:rank]) @ vh[:rank], rows * columns)


def weighted_loss(error: Tensor, row_weight: Tensor, column_weight: Tensor) -> float:
    """Weighted squared error summed exactly."""
    return math.fsum(
        (error.double() * row_weight.double()[:, None] * column_weight.double()).square().flatten().tolist()
    )


def decompose_losses(
    weight: Tensor, fmt: BlockFormat, rank: int, row_weight: Tensor, column_weight: Tensor, iterations: int
) -> list[float]:
    """Losses of `iterations` alternations with float64 factors and full SVDs."""
    quantised, losses = torch.zeros_like(weight, dtype=torch.float64), []
    for _ in range(iterations):
        low_rank = weighted_lowrank(weight.double() - quantised, rank, row_weight, column_weight)
        codes, _, scale = quantize(weight.double() - low_rank, fmt)
        quantised = dequantize(codes, scale, fmt.bits)
        losses.append(weighted_loss(weight.double() - low_rank - quantised, row_weight, column_weight))
    return losses


def root_mean_square(batches: list[Tensor]) -> Tensor:
    """Root mean square over all leading dimensions of all batches, float64 [features]."""
    tokens = torch.cat([batch.double().reshape(-1, batch.shape[-1]) for batch in batches])
    return tokens.square().mean(dim=0).sqrt()


def covariance(batches: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Weighted mean of x x^T over all tokens of all batches, float64 [n, n]."""
    tokens = torch.cat([batch.double().reshape(-1, batch.shape[-1]) for batch in batches])
    weight = torch.cat([part.double().reshape(-1) for part in weights])
    return torch.einsum("t,ti,tj->ij", weight, tokens, tokens) / weight.sum()

"""Slow float64 twins of the numerics in this package, written for clarity; tests compare against them."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from quant.scales import torch_dtype
from quant.storage import Choice, packed_columns


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


def grid_levels(choice: Choice) -> Tensor:
    """Levels of the grids that have their own, float64 [2**bits]."""
    half = 2 ** (choice.bits - 1)
    if choice.grid == "nf":
        return normal_float(choice.bits)
    return torch.arange(2 * half, dtype=torch.float64) - (half if choice.grid == "int" else 0)


def quantize(
    weight: Tensor, choice: Choice, levels: Tensor | None = None, multiples: Sequence[float] = (1.0,)
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(codes uint8 [rows, columns], stored scales or their codes [rows, blocks], rebuilt scales float64 [rows,
    blocks], zero points uint8 [rows, blocks] of the grid "uint").

    Only casts that are part of the format leave float64: of the superblock maxima, or of direct scales.
    """
    rows, columns = weight.shape
    levels = grid_levels(choice) if levels is None else levels.double()
    blocks = weight.double().reshape(-1, choice.block_size)
    wanted = torch.stack([_best_scale(block, choice, levels, multiples) for block in blocks])
    values, scale = _stored_scales(wanted, choice, columns // choice.block_size)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    zero = torch.zeros(len(blocks), dtype=torch.uint8)
    for index, block in enumerate(blocks):
        ratio = block / scale[index] if scale[index] != 0 else torch.zeros_like(block)
        zero[index] = _zero_point(block, choice)
        codes[index] = encode(ratio + zero[index], levels)
    zeros = zero.view(rows, -1) if choice.grid == "uint" else None
    return codes.view(rows, columns), values.view(rows, -1), scale.view(rows, -1), zeros


def _range_scale(block: Tensor, choice: Choice) -> Tensor:
    """The smallest scale at which the farthest levels reach the block's extremes."""
    low, high, half = block.min(), block.max(), 2 ** (choice.bits - 1)
    if choice.grid == "uint":
        return torch.div(high.clamp(min=0) - low.clamp(max=0), 2 * half - 1)
    if choice.grid == "int":
        return torch.maximum(high / (half - 1), -low / half)
    return block[block.abs().argmax()] if choice.signed_scales else block.abs().max()


def _zero_point(block: Tensor, choice: Choice) -> int:
    """The code that stands for zero when the codes span the block's whole range; 0 on grids without one."""
    whole = _range_scale(block, choice)
    return round(float(-block.min().clamp(max=0) / whole)) if choice.grid == "uint" and whole != 0 else 0


def _best_scale(block: Tensor, choice: Choice, levels: Tensor, multiples: Sequence[float]) -> Tensor:
    """Of the range's scale times each of `multiples` the first whose nearest codes leave the least squared error."""
    whole, zero, errors = _range_scale(block, choice), _zero_point(block, choice), []
    for multiple in multiples:
        scale = whole * multiple
        ratio = block / scale + zero if scale != 0 else torch.zeros_like(block)
        errors.append(float((block - scale * (levels.double()[encode(ratio, levels).long()] - zero)).square().sum()))
    return whole * multiples[errors.index(min(errors))]


def _stored_scales(wanted: Tensor, choice: Choice, per_row: int) -> tuple[Tensor, Tensor]:
    """(what is stored, float64 scales it stands for) of a 1-D list of scales."""
    if choice.direct:
        held = wanted.float().to(torch_dtype(choice.scale_dtype))
        return held, held.double()
    if choice.signed_scales:
        codes, scale = _coded_scales(wanted.abs(), choice, choice.scale_bits - 1, per_row)
        negative = (wanted < 0).to(torch.uint8)
        return codes + negative * 2 ** (choice.scale_bits - 1), torch.where(negative > 0, -scale, scale)
    return _coded_scales(wanted, choice, choice.scale_bits, per_row)


def _coded_scales(wanted: Tensor, choice: Choice, bits: int, per_row: int) -> tuple[Tensor, Tensor]:
    """(codes of `bits` bits, the float64 scales they stand for) of a 1-D list of scales."""
    offset, largest = wanted.min(), 2**bits - 1
    codes, scale = torch.zeros_like(wanted), torch.zeros_like(wanted)
    size = choice.superblock or per_row
    for start in range(0, len(wanted), size):
        part = slice(start, start + size)
        above = wanted[part] - offset
        maximum = above.max().float().to(torch_dtype(choice.scale_dtype)).double()
        if maximum > 2.0**-24:
            codes[part] = (above * largest / maximum).round().clamp(0, largest)
        scale[part] = offset + codes[part] * maximum / largest
    return codes.to(torch.uint8), scale


def dequantize(codes: Tensor, scale: Tensor, levels: Tensor, zero: Tensor | None = None) -> Tensor:
    """Level, less the zero point, times scale in float64 [rows, columns]."""
    width = codes.shape[1] // scale.shape[1]
    shift = 0 if zero is None else zero.double().repeat_interleave(width, dim=1)
    return (levels.double()[codes.long()] - shift) * scale.double().repeat_interleave(width, dim=1)


def lloyd_fit(values: Tensor, weights: Tensor, levels: Tensor, iterations: int, pinned: tuple[int, ...] = ()) -> Tensor:
    """Weighted Lloyd iterations by full comparison, float64 [levels]; levels at the indices `pinned` stay."""
    values, weights, levels = values.double(), weights.double(), levels.double().clone()
    for _ in range(iterations):
        nearest = encode(values, levels)
        for index in range(len(levels)):
            own = nearest == index
            if index not in pinned and weights[own].sum() > 0:
                levels[index] = (weights[own] * values[own]).sum() / weights[own].sum()
    return levels


def lloyd(bits: int, block_size: int, blocks: int, seed: int, iterations: int) -> Tensor:
    """Lloyd levels of Gaussian blocks divided by their largest weight, zero and one pinned, float64 [2**bits]."""
    draws = torch.randn(blocks, block_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    largest = torch.stack([block[block.abs().argmax()] for block in draws])[:, None]
    weights = largest.square().expand_as(draws).flatten()
    half = 2 ** (bits - 1)
    return lloyd_fit((draws / largest).flatten(), weights, normal_float(bits), iterations, (half - 1, 2 * half - 1))


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


def metric_loss(error: Tensor, outputs: Tensor, covariance: Tensor) -> float:
    """``tr(G E H E^T)`` with G = diag(outputs^2), H = covariance."""
    error = error.double() * outputs.double()[:, None]
    return math.fsum((error @ covariance.double() * error).flatten().tolist())


def compensated(
    weight: Tensor,
    choice: Choice,
    covariance: Tensor,
    *,
    transposed: bool,
    levels: Tensor,
    damping: float,
    multiples: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor, Tensor]:
    """Error-compensated rounding of `weight` [out, in] one column at a time: before each, the columns still to come are
    those that minimise ``tr(E H E^T)`` given the errors so far, by solving for them (Optimal Brain Quantization).

    Returns float64 (Q [out, in], error of each column in its turn [out, in], and for an error of 1 in each what it
    leaves in all columns [in, in]): W - Q is the product of the last two.
    """
    weight, hessian, size = weight.double(), covariance.double(), choice.block_size
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    coded = _second_level(weight.T if transposed else weight, choice, min(multiples))
    key = [(-float(value), index) for index, value in enumerate(covariance.diagonal().double())]
    if transposed:
        order = [index for _, index in sorted(key)]
    else:
        blocks = [sorted(key[start : start + size]) for start in range(0, len(key), size)]
        order = [index for block in sorted(blocks, key=lambda block: sum(k for k, _ in block)) for _, index in block]
    result, errors, left = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(hessian)
    scale = zero = torch.zeros(0)
    for step, column in enumerate(order):
        fixed, rest = order[:step], order[step:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        now = weight[:, rest] + (weight - result)[:, fixed] @ hessian[fixed][:, rest] @ inverse
        if transposed:
            blocks_now, second = now[:, 0].view(-1, size), coded(column, slice(None))
            scale, zero = _block_scales(blocks_now, choice, second, levels, multiples)
        elif step % size == 0:
            scale, zero = _block_scales(now[:, :size], choice, coded(slice(None), column // size), levels, multiples)
        wide = [part.repeat_interleave(size) if transposed else part for part in (scale, zero)]
        ratio = torch.where(wide[0] != 0, now[:, 0] / wide[0], 0.0) + wide[1]
        result[:, column] = wide[0] * (levels.double()[encode(ratio, levels).long()] - wide[1])
        errors[:, column] = now[:, 0] - result[:, column]
        left[column, rest] = inverse[0] / inverse[0, 0]
    return result, errors, left


def round_masked(
    weight: Tensor,
    covariance: Tensor,
    mask: Tensor,
    scale: Tensor,
    levels: Tensor,
    zero: Tensor | None,
    *,
    order: Sequence[int],
    damping: float,
) -> Tensor:
    """Q, float64 [out, in], of `weight` [out, in] under the scale and zero of every entry, [out, in] each: zero where
    `mask`, else the nearest level to what minimises ``tr(E H E^T)`` given the errors so far, solved for one column at a
    time."""
    weight, hessian = weight.double(), covariance.double()
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    result = torch.zeros_like(weight)
    for step, column in enumerate(order):
        fixed, rest = list(order[:step]), list(order[step:])
        pull = hessian[fixed][:, rest] @ torch.linalg.inv(hessian[rest][:, rest])
        now = weight[:, column] + ((weight - result)[:, fixed] @ pull)[:, 0]
        shift = 0.0 if zero is None else zero[:, column].double()
        size = scale[:, column].double()
        ratio = torch.where(size != 0, now / size, 0.0) + shift
        found = size * (levels.double()[encode(ratio, levels).long()] - shift)
        result[:, column] = torch.where(mask[:, column], 0.0, found)
    return result


def _second_level(stored: Tensor, choice: Choice, least: float) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
    """Maximum and offset for blocks of the stored matrix, by row and block: a quarter of room above the largest, and
    from the smallest down to `least` times it."""
    blocks = stored.reshape(-1, choice.block_size)
    wanted = torch.stack([_range_scale(block, choice) for block in blocks]).abs()
    if choice.direct:
        return lambda rows, columns: (torch.tensor(float("nan")), torch.tensor(float("nan")))
    per_row = stored.shape[1] // choice.block_size
    above = (1.25 * wanted - least * wanted.min()).view(-1, choice.superblock or per_row).amax(dim=1)
    held = above.float().to(torch_dtype(choice.scale_dtype)).double()
    spread = held.repeat_interleave(choice.superblock or per_row).view(-1, per_row)
    return lambda rows, columns: (spread[rows, columns], least * wanted.min())


def _block_scales(
    blocks: Tensor, choice: Choice, coded: tuple[Tensor, Tensor], levels: Tensor, multiples: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Scales as stored and zero points, float64 [blocks], of blocks [blocks, block_size]."""
    wanted, (maximum, offset) = torch.stack([_best_scale(block, choice, levels, multiples) for block in blocks]), coded
    if choice.direct:
        scale = wanted.float().to(torch_dtype(choice.scale_dtype)).double()
    else:
        largest = 2 ** (choice.scale_bits - choice.signed_scales) - 1
        codes = ((wanted.abs() - offset) * largest / maximum).round().clamp(0, largest)
        scale = torch.where(wanted < 0, -1.0, 1.0) * (offset + codes * maximum / largest)
    return scale, scale.new_tensor([_zero_point(block, choice) for block in blocks])


def decompose_losses(
    weight: Tensor, choice: Choice, row_weight: Tensor, column_weight: Tensor, iterations: int
) -> list[float]:
    """Losses of `iterations` alternations with float64 factors and full SVDs."""
    quantised, losses = torch.zeros_like(weight, dtype=torch.float64), []
    for _ in range(iterations):
        low_rank = weighted_lowrank(weight.double() - quantised, choice.rank, row_weight, column_weight)
        codes, _, scale, zero = quantize(weight.double() - low_rank, choice)
        quantised = dequantize(codes, scale, grid_levels(choice), zero)
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

"""Blockwise NormalFloat quantisation with quantised scales, and its exact storage cost."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quant.codebook import CODEBOOK_BITS, encode, normal_float
from quant.exceptions import NonFiniteError, QuantError, ShapeError
from quant.storage import PACK_BITS, WORD_BITS, packed_columns

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# A superblock whose scales differ by no more than this has nothing to encode: every scale is the offset.
_SMALLEST_SCALE_MAX = 2.0**-24

# Elements handled at once: bounds the temporaries to a few MB, which also keeps them in the CPU's cache.
_CHUNK = 1 << 18


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is quantised; the paper's (b0, b1, b2, B0, B1).

    bits: width of a weight code, 2, 3, 4 or 8. block_size: weights along a row that share one scale.
    scale_bits: width of a scale code, 2, 3, 4 or 8. scale_dtype: dtype of each superblock's maximum.
    superblock: scales that share one maximum, counted in row-major order; None is one superblock a row, which
    survives row slicing. Raises QuantError for values outside these sets.
    """

    bits: int
    block_size: int
    scale_bits: int = 8
    scale_dtype: torch.dtype = torch.bfloat16
    superblock: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in CODEBOOK_BITS:
            raise QuantError(f"bits must be one of {CODEBOOK_BITS}, got {self.bits}")
        if self.scale_bits not in PACK_BITS:
            raise QuantError(f"scale_bits must be one of {PACK_BITS}, got {self.scale_bits}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise QuantError(f"scale_dtype must be one of {SCALE_DTYPES}, got {self.scale_dtype}")
        if self.block_size < 1:
            raise QuantError(f"block_size must be positive, got {self.block_size}")
        if self.superblock is not None and self.superblock < 1:
            raise QuantError(f"superblock must be positive or None, got {self.superblock}")

    @property
    def name(self) -> str:
        """Short unique name, such as ``nf3-b64-s8-bfloat16`` or ``nf3-b64-s8-bfloat16-S256``."""
        dtype = str(self.scale_dtype).removeprefix("torch.")
        tail = "" if self.superblock is None else f"-S{self.superblock}"
        return f"nf{self.bits}-b{self.block_size}-s{self.scale_bits}-{dtype}{tail}"

    def blocks_per_row(self, columns: int) -> int:
        """Blocks in a row of `columns` weights; ShapeError when the last would be ragged."""
        if columns < 1 or columns % self.block_size:
            raise ShapeError(f"{columns} columns do not split into blocks of {self.block_size}")
        return columns // self.block_size

    def blocks_per_superblock(self, columns: int) -> int:
        """Blocks that share one second-level maximum in a matrix of `columns` columns."""
        return self.blocks_per_row(columns) if self.superblock is None else self.superblock

    def superblocks(self, rows: int, columns: int) -> int:
        """Superblocks of a [rows, columns] matrix; ShapeError when the last would be ragged."""
        blocks = rows * self.blocks_per_row(columns)
        per_superblock = self.blocks_per_superblock(columns)
        if blocks < 1 or blocks % per_superblock:
            raise ShapeError(f"{blocks} blocks do not split into superblocks of {per_superblock}")
        return blocks // per_superblock


@dataclass(frozen=True)
class BlockQuantized:
    """A quantised [rows, columns] matrix.

    codes: uint8 [rows, columns]. scale_codes: uint8 [rows, columns // block_size]. scale_max: [superblocks]
    in the format's scale_dtype. scale_offset: fp32 [1], the smallest first-level scale of the matrix.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_max: Tensor
    scale_offset: Tensor


@torch.no_grad()
def quantize(weight: Tensor, fmt: BlockFormat) -> BlockQuantized:
    """Quantise fp32 `weight` [rows, columns] with LQ-LoRA's (arXiv 2311.12023) form of double quantisation.

    Codes are taken against the scale that `scales` will rebuild, so ``dequantize(codes, scales(...), bits)``
    is what was scored. Defined where the published method is not: a superblock whose scales are equal to
    within 2**-24 gets scale code 0, and a block whose rebuilt scale is zero gets the code of the zero level.

    Peak: one byte a weight for the result plus a few MB. Raises ShapeError when blocks or superblocks would
    be ragged, QuantError for another dtype, NonFiniteError for NaN or infinity, or a scale range that
    scale_dtype cannot hold.
    """
    if weight.dim() != 2:
        raise ShapeError(f"weight must be [rows, columns], got {list(weight.shape)}")
    if weight.dtype != torch.float32:
        raise QuantError(f"weight must be float32, got {weight.dtype}")
    rows, columns = weight.shape
    superblocks = fmt.superblocks(rows, columns)
    blocks = weight.reshape(-1, fmt.block_size)
    step = max(1, _CHUNK // fmt.block_size)
    absmax = torch.cat([blocks[i : i + step].abs().amax(dim=1) for i in range(0, len(blocks), step)])
    if not bool(torch.isfinite(absmax).all()):
        raise NonFiniteError("weight holds NaN or infinity")

    scale_offset = absmax.amin().view(1)
    above = (absmax - scale_offset).view(superblocks, -1)
    scale_max = above.amax(dim=1).to(fmt.scale_dtype)
    if not bool(torch.isfinite(scale_max).all()):
        raise NonFiniteError(f"block scales spread too far for {fmt.scale_dtype}; use bfloat16 or float32 scales")
    largest = 2**fmt.scale_bits - 1
    maximum = scale_max.float().view(-1, 1)
    maximum = torch.where(maximum > _SMALLEST_SCALE_MAX, maximum, 1.0)  # divided by 1, so small a spread is code 0
    scale_codes = (above * largest / maximum).round_().clamp_(0, largest).to(torch.uint8).view(rows, -1)

    scale = scales(scale_codes, scale_max, scale_offset, fmt).view(-1, 1)
    divisor = torch.where(scale == 0, float("inf"), scale)  # x / inf = 0, which encodes as the zero level
    codebook = normal_float(fmt.bits).to(weight.device)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        codes[part] = encode(blocks[part] / divisor[part], codebook)
    return BlockQuantized(codes.view(rows, columns), scale_codes, scale_max, scale_offset)


def scales(scale_codes: Tensor, scale_max: Tensor, scale_offset: Tensor, fmt: BlockFormat) -> Tensor:
    """First-level scales fp32 [rows, blocks] rebuilt from uint8 codes [rows, blocks], maxima [superblocks],
    offset fp32 [1].

    This is the one definition of a scale; slicing whole superblocks of all arguments slices the result.
    Raises ShapeError when codes and maxima do not match.
    """
    rows, blocks = scale_codes.shape
    if scale_max.dim() != 1 or fmt.superblocks(rows, blocks * fmt.block_size) != len(scale_max):
        raise ShapeError(
            f"scale codes {list(scale_codes.shape)} do not fit {list(scale_max.shape)} maxima of {fmt.name}"
        )
    largest = 2.0**fmt.scale_bits - 1
    spread = scale_codes.float().view(len(scale_max), -1) * scale_max.float().view(-1, 1) / largest
    return (spread + scale_offset).view(rows, blocks)


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weights fp32 [rows, columns] from uint8 `codes` [rows, columns] and fp32 `scale` [rows, blocks]: level
    times scale.

    Peak: four bytes a weight for the result plus a few MB. Raises ShapeError when the blocks do not divide
    the columns.
    """
    rows, columns = codes.shape
    if scale.dim() != 2 or scale.shape[0] != rows or scale.shape[1] < 1 or columns % scale.shape[1]:
        raise ShapeError(f"scale {list(scale.shape)} does not fit codes {list(codes.shape)}")
    flat = codes.reshape(-1)
    # Two neighbouring codes read as one index halve the look-ups; at 8 bits the table of pairs would outgrow
    # the cache.
    paired = bits < 8 and columns % 2 == 0 and flat.storage_offset() % 2 == 0
    table = _level_table(bits, paired, codes.device)
    index = (flat.view(torch.int16) if paired else flat).view(rows, -1)
    blocks = scale.shape[1]
    weight = torch.empty(rows, blocks, columns // blocks, dtype=torch.float32, device=codes.device)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        levels = table.index_select(0, index[part].reshape(-1).to(torch.int32)).view(torch.float32)
        torch.mul(levels.view_as(weight[part]), scale[part].unsqueeze(-1), out=weight[part])
    return weight.view(rows, columns)


@lru_cache(maxsize=64)
def _level_table(bits: int, paired: bool, device: torch.device) -> Tensor:
    """Levels fp32, or the two levels of a pair of codes as one int64, indexed by the pair as int16."""
    levels = normal_float(bits)
    if paired:
        every = torch.arange(2**bits, dtype=torch.uint8, device="cpu")
        pairs = torch.cartesian_prod(every, every)
        index = pairs.view(torch.int16).view(-1).long()
        table = torch.zeros(int(index.max()) + 1, 2, dtype=torch.float32, device="cpu")
        table[index] = levels[pairs.long()]
        levels = table.view(torch.int64).view(-1)
    return levels.to(device)


def storage_bits(rows: int, columns: int, fmt: BlockFormat) -> int:
    """Exact bits that a quantised [rows, columns] matrix takes, low-rank factors apart.

    Weight codes as packed words, scale codes as bytes at 8 bits and as packed words otherwise (row padding
    counted in both), the superblock maxima, and the 32-bit offset. Without padding this is LQ-LoRA's ``rows *
    columns * (b0 + b1/B0 + b2/(B0 B1)) + 32``. Raises ShapeError when blocks or superblocks would be ragged.
    """
    blocks = fmt.blocks_per_row(columns)
    code_bits = rows * packed_columns(columns, fmt.bits) * WORD_BITS
    row_scale_bits = blocks * 8 if fmt.scale_bits == 8 else packed_columns(blocks, fmt.scale_bits) * WORD_BITS
    maxima_bits = fmt.superblocks(rows, columns) * fmt.scale_dtype.itemsize * 8
    return code_bits + rows * row_scale_bits + maxima_bits + 32

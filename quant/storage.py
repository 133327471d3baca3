"""Shapes and dtypes of a packed linear map on disk and in memory: pure arithmetic, no tensors.

The plan adds these up before a weight is touched, and quant.linear registers exactly these buffers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from quant.exceptions import QuantError, ShapeError

WORD_BITS = 32
"""Codes are packed into int32 words."""

GPTQ_MULTIPLE = 32
"""Both sides of a GPTQ matrix are multiples of this, so that its words are whole at every width."""

GGUF_BLOCK = 32
"""Weights of a GGUF block of the kinds that have one step."""

BITSANDBYTES_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has at 4 bits."""

PACK_BITS = (2, 3, 4, 8)
"""Widths that have a packed layout."""

GRIDS = ("nf", "lloyd", "int", "uint")
"""Where codes lie: NormalFloat levels, levels of the caller's own, signed integers, integers with a zero point."""

DIRECT_SCALE_DTYPES = {16: ("float16", "bfloat16"), 32: ("float32",)}
"""Dtypes of first-level scales stored as they are, by their width."""

UNSEARCHED = (1.0,)
SEARCHED = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Multiples of the scale that clips nothing, of which a block gets the best: not searched, and searched."""

SCALE_DTYPES = ("bfloat16", "float16", "float32")

FACTOR_DTYPES = (*SCALE_DTYPES, "int8")


@dataclass(frozen=True)
class Choice:
    """How one matrix is stored: the format of Q, and rank and dtype of the low-rank part. Knows no shape.

    grid: one of GRIDS. bits: width of a weight code. block_size: weights along a stored row that share one scale.
    A weight is ``scale * levels[code]``; on the grid "uint" ``scale * (levels[code] - zero)`` with an integer zero
    per block. scale_bits: 2, 3, 4 or 8 for LQ-LoRA's double-quantised scales (arXiv 2311.12023), with scale_dtype
    the dtype of each superblock's maximum; 16 or 32 for scales kept as they are, in scale_dtype. superblock: blocks
    that share one maximum, counted in row-major order; None is one superblock a row, which survives row slicing.
    factor_dtype: "int8" has one fp32 scale per component. dtypes are torch names without the prefix.

    Raises QuantError for values outside these sets.
    """

    grid: str
    bits: int
    block_size: int
    rank: int
    scale_bits: int = 8
    scale_dtype: str = "bfloat16"
    superblock: int | None = None
    factor_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("grid", GRIDS),
            ("bits", PACK_BITS),
            ("scale_bits", (*PACK_BITS, *DIRECT_SCALE_DTYPES)),
            ("scale_dtype", DIRECT_SCALE_DTYPES.get(self.scale_bits, SCALE_DTYPES)),
            ("factor_dtype", FACTOR_DTYPES),
        ):
            if getattr(self, field) not in allowed:
                at = f" with scale_bits {self.scale_bits}" if field == "scale_dtype" else ""
                raise QuantError(f"{field} must be one of {allowed}{at}, got {getattr(self, field)!r}")
        if self.block_size < 1:
            raise QuantError(f"block_size must be positive, got {self.block_size}")
        if self.rank < 0:
            raise QuantError(f"rank must not be negative, got {self.rank}")
        if self.superblock is not None and (self.superblock < 1 or self.direct):
            expected = "None where scales are not double-quantised" if self.direct else "positive or None"
            raise QuantError(f"superblock must be {expected}, got {self.superblock}")

    @property
    def direct(self) -> bool:
        """Whether first-level scales are stored as they are."""
        return self.scale_bits in DIRECT_SCALE_DTYPES

    @property
    def signed_scales(self) -> bool:
        """Whether a block's scale has the sign of its largest weight."""
        return self.grid == "lloyd"

    @property
    def name(self) -> str:
        """Short and unique, such as ``nf3-b64-r0`` or ``int4-b128-r16-s16-float16``: defaults are left out."""
        parts = [f"{self.grid}{self.bits}", f"b{self.block_size}", f"r{self.rank}"]
        for prefix, field in (("s", "scale_bits"), ("", "scale_dtype"), ("S", "superblock"), ("L", "factor_dtype")):
            value = getattr(self, field)
            if value != getattr(Choice, field):
                parts.append(f"{prefix}{value}")
        return "-".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Every field by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Choice":
        """Inverse of `to_json`; other keys of `row` are left alone. Raises QuantError if one is missing."""
        missing = [field.name for field in fields(cls) if field.name not in row]
        if missing:
            raise QuantError(f"expected a choice with every field, found none of {', '.join(missing)} in {dict(row)}")
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    def sliced(self) -> "Choice":
        """The choice of a matrix some of whose rows are gone.

        A superblock that spans rows would lose members, and its scales with it: they are kept as they are, in fp32.
        """
        if self.superblock is None:
            return self
        return replace(self, scale_bits=32, scale_dtype="float32", superblock=None)

    def blocks_per_row(self, columns: int) -> int:
        """Blocks in a stored row of `columns` weights; ShapeError when the last would be ragged."""
        if columns < 1 or columns % self.block_size:
            raise ShapeError(f"{columns} columns do not split into blocks of {self.block_size}")
        return columns // self.block_size

    def superblocks(self, rows: int, columns: int) -> int:
        """Superblocks of a stored [rows, columns] matrix; ShapeError when the last would be ragged."""
        per_row = self.blocks_per_row(columns)
        blocks, size = rows * per_row, self.superblock or per_row
        if blocks < 1 or blocks % size:
            raise ShapeError(f"{blocks} blocks do not split into superblocks of {size}")
        return blocks // size


@dataclass(frozen=True)
class PackedShape:
    """A packed linear map W = Q + left @ right.

    `transposed` matrices are stored as [in, out], so that the axis that pruning cuts is always the row axis; blocks
    run along the other axis.
    """

    in_features: int
    out_features: int
    choice: Choice
    transposed: bool
    bias: bool = False

    @property
    def rows(self) -> int:
        return self.in_features if self.transposed else self.out_features

    @property
    def columns(self) -> int:
        return self.out_features if self.transposed else self.in_features

    def buffers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name to (dtype, shape) of every stored tensor, in storage order.

        ``codes`` and, at other widths than 8, ``scale_codes`` are rows of packed words, as are ``zero_codes`` of the
        grid "uint". Raises ShapeError when blocks or superblocks would be ragged.
        """
        choice, rows = self.choice, self.rows
        blocks = choice.blocks_per_row(self.columns)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("int32", (rows, packed_columns(self.columns, choice.bits))),
            "levels": ("float32", (2**choice.bits,)),
        }
        if choice.grid == "uint":
            found["zero_codes"] = ("int32", (rows, packed_columns(blocks, choice.bits)))
        if choice.direct:
            found["scale"] = (choice.scale_dtype, (rows, blocks))
        else:
            words = ("int32", (rows, packed_columns(blocks, choice.scale_bits)))
            found["scale_codes"] = ("uint8", (rows, blocks)) if choice.scale_bits == 8 else words
            found["scale_max"] = (choice.scale_dtype, (choice.superblocks(rows, self.columns),))
            found["scale_offset"] = ("float32", (1,))
        found["lowrank_left"] = (choice.factor_dtype, (self.out_features, choice.rank))
        found["lowrank_right"] = (choice.factor_dtype, (choice.rank, self.in_features))
        if choice.factor_dtype == "int8":
            found["lowrank_scale"] = ("float32", (choice.rank,))
        if self.bias:
            found["bias"] = ("float32", (self.out_features,))
        return found


def packed_columns(columns: int, bits: int) -> int:
    """int32 words that a row of `columns` codes of `bits` bits takes, padding included; see quant.pack for the layout.

    Raises QuantError for a width that has no layout, ShapeError for a negative number of columns.
    """
    if bits not in PACK_BITS:
        raise QuantError(f"packing is defined for {PACK_BITS} bits, not {bits}")
    if columns < 0:
        raise ShapeError(f"a row cannot have {columns} codes")
    per_group = WORD_BITS if bits == 3 else WORD_BITS // bits
    words_per_group = 3 if bits == 3 else 1
    return -(-columns // per_group) * words_per_group

"""Shapes and dtypes of a packed linear map on disk and in memory: pure arithmetic, no tensors.

The plan adds these up before a weight is touched, and quant.linear registers exactly these buffers.
"""

from dataclasses import dataclass

from quant.exceptions import QuantError, ShapeError

WORD_BITS = 32
"""Codes are packed into int32 words."""

PACK_BITS = (2, 3, 4, 8)
"""Widths that have a packed layout."""


@dataclass(frozen=True)
class Choice:
    """One configuration of a matrix: NormalFloat bits, weights per block, rank of the low-rank part."""

    bits: int
    block_size: int
    rank: int

    @property
    def name(self) -> str:
        return f"nf{self.bits}-b{self.block_size}-r{self.rank}"


@dataclass(frozen=True)
class PackedShape:
    """A packed linear map W = Q + left @ right.

    `transposed` matrices are stored as [in, out], so that the axis that pruning cuts is always the row axis; blocks
    run along the other axis, and second-level groups are single rows. dtypes are torch names without the prefix.
    """

    in_features: int
    out_features: int
    choice: Choice
    transposed: bool
    scale_bits: int = 8
    scale_dtype: str = "bfloat16"
    factor_dtype: str = "bfloat16"
    bias: bool = False

    @property
    def rows(self) -> int:
        return self.in_features if self.transposed else self.out_features

    @property
    def columns(self) -> int:
        return self.out_features if self.transposed else self.in_features

    def buffers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name to (dtype, shape) of every stored tensor, in storage order."""
        choice = self.choice
        blocks = self.columns // choice.block_size
        scale_codes = (
            ("uint8", (self.rows, blocks))
            if self.scale_bits == 8
            else ("int32", (self.rows, packed_columns(blocks, self.scale_bits)))
        )
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("int32", (self.rows, packed_columns(self.columns, choice.bits))),
            "scale_codes": scale_codes,
            "scale_max": (self.scale_dtype, (self.rows,)),
            "scale_offset": ("float32", (1,)),
            "lowrank_left": (self.factor_dtype, (self.out_features, choice.rank)),
            "lowrank_right": (self.factor_dtype, (choice.rank, self.in_features)),
        }
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

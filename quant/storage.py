"""Shapes and dtypes of a packed linear map on disk and in memory: pure arithmetic, no tensors.

The plan adds these up before a weight is touched, and quant.linear registers exactly these buffers.
"""

from dataclasses import dataclass

WORD_BITS = 32
"""Codes are packed into int32 words."""


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
    """int32 words that a row of `columns` codes takes; the last word (at 3 bits: group of three) is zero padded.

    2, 4 and 8 bits: 32 / bits codes a word, first code in the lowest bits. 3 bits: three words per 32 codes, word p
    holding bit p of each. Raises ValueError for other widths.
    """
    if bits == 3:
        return 3 * -(-columns // WORD_BITS)
    if bits not in (2, 4, 8):
        raise ValueError(f"bits must be 2, 3, 4 or 8, found {bits}")
    return -(-columns * bits // WORD_BITS)

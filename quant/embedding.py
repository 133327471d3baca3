"""Embedding tables whose rows stay packed until they are looked up, and the head that is tied to one."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from quant.blockwise import quantize
from quant.buffers import slice_rows
from quant.exceptions import QuantError
from quant.linear import PackedMatrix, dense_weight, product
from quant.pack import pack
from quant.rebuild import row_chunks
from quant.scales import torch_dtype
from quant.storage import PackedShape


@torch.no_grad()
def quantize_rows(weight: Tensor, shape: PackedShape) -> dict[str, Tensor]:
    """Every stored tensor of `shape`, a table without a low-rank part and with direct scales on a grid without zero
    points, from `weight` [out, in] of any floating dtype: nearest codes, a chunk of rows at a time.

    Peak bytes beside the weight and the result: about 16 x 2**20. Raises as `quant.blockwise.quantize`.
    """
    found = {name: torch.empty(size, dtype=torch_dtype(dtype)) for name, (dtype, size) in shape.buffers().items()}
    for rows in row_chunks(shape.rows, shape.columns):
        part = quantize(weight[rows].float(), shape.choice)
        found["codes"][rows] = pack(part.codes, shape.choice.bits)
        found["scale"][rows] = part.scales.values
        found["levels"] = part.levels
    return found


class PackedEmbedding(PackedMatrix):
    """Rows of W by index, times `factor` in `dtype`: what nn.Embedding of that dtype does, and Gemma's, which scales.

    Constant: no gradient reaches it. Peak bytes beyond the result: 12 x in for every index looked up, never the table.

    Raises:
        QuantError: a transposed map, whose stored rows are not those of W. As PackedMatrix.
    """

    def __init__(
        self, shape: PackedShape, *, dtype: torch.dtype, factor: float = 1.0, device: torch.device | str | None = None
    ) -> None:
        if shape.transposed:
            raise QuantError("an embedding is looked up by row, expected a map that is not transposed")
        super().__init__(shape, device)
        self.dtype, self.factor = dtype, factor

    @torch.no_grad()
    def forward(self, indices: Tensor) -> Tensor:
        """int64 or int32 [...] -> [..., in] in `dtype`; on the CPU an index outside the table is torch's error."""
        flat = indices.reshape(-1)
        shape = replace(self.shape, out_features=len(flat), choice=self.shape.choice.sliced())
        found = dense_weight(slice_rows(self.frozen(), self.shape, flat), shape).to(self.dtype)
        if self.factor != 1:
            found *= torch.full((), self.factor, dtype=self.dtype, device=found.device)
        return found.view(*indices.shape, shape.in_features)


class TiedHead(nn.Module):
    """``y = x @ W^T`` with the table of an embedding, its factor left out.

    It reads the embedding's own buffers and has none, so there is one copy, wherever the model is moved or saved.
    """

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        # In a tuple it is no submodule: its buffers have one name.
        self._embedding = (embedding,)

    @property
    def shape(self) -> PackedShape:
        return self._embedding[0].shape

    @property
    def qweight(self) -> Tensor:
        """As `PackedMatrix.qweight`."""
        return self._embedding[0].qweight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in x's dtype (autocast's dtype under autocast)."""
        return product(x, self._embedding[0].frozen(), self.shape)

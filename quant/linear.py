"""The packed decomposed linear map ``W = Q + left @ right``, with an optional trainable task adapter.

Q is stored as packed codes and rebuilt in row chunks at every use, in forward and again in backward; nothing
of the size of the weight is kept between them. A transposed map stores Q as [in, out], so that the axis that
pruning cuts is always the row axis of the stored matrix: slicing rows of the buffers slices the map exactly.

Source: LQ-LoRA, arXiv 2311.12023 (Q + L1 L2); QLoRA, arXiv 2305.14314 (rebuild at use).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from quant.blockwise import BlockFormat, dequantize, scales
from quant.exceptions import QuantError, ShapeError
from quant.pack import unpack
from quant.rebuild import add_product_, autocast_input, check_input, row_chunks, without_autocast
from quant.storage import Choice, PackedShape


def buffer_spec(
    in_features: int,
    out_features: int,
    fmt: BlockFormat,
    rank: int,
    transposed: bool,
    factor_dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name to (dtype, shape) of the buffers of a ``PackedLinear``, from ``quant.storage``.

    Raises:
        QuantError: superblocks other than one per row (they would not survive row slicing); negative rank.
        ShapeError: the block size does not divide the stored columns.
    """
    if fmt.superblock is not None:
        raise QuantError(f"a packed linear map has one superblock a row; found superblock={fmt.superblock}")
    if rank < 0:
        raise QuantError(f"rank must not be negative, found {rank}")
    shape = PackedShape(
        in_features=in_features,
        out_features=out_features,
        choice=Choice(bits=fmt.bits, block_size=fmt.block_size, rank=rank),
        transposed=transposed,
        scale_bits=fmt.scale_bits,
        scale_dtype=str(fmt.scale_dtype).removeprefix("torch."),
        factor_dtype=str(factor_dtype).removeprefix("torch."),
        bias=bias,
    )
    fmt.blocks_per_row(shape.columns)
    return {name: (getattr(torch, dtype), sizes) for name, (dtype, sizes) in shape.buffers().items()}


Packed = tuple[Tensor, Tensor, Tensor, Tensor]
"""codes, scale_codes, scale_max, scale_offset."""


def _stored_chunks(packed: Packed, fmt: BlockFormat, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the stored Q, fp32 [chunk, columns], in order."""
    codes, scale_codes, scale_max, scale_offset = packed
    if fmt.scale_bits != 8:
        scale_codes = unpack(scale_codes, fmt.scale_bits, fmt.blocks_per_row(columns))
    scale = scales(scale_codes, scale_max, scale_offset, fmt)
    for rows in row_chunks(codes.shape[0], columns):
        yield rows, dequantize(unpack(codes[rows], fmt.bits, columns), scale[rows], fmt.bits)


def _product(v: Tensor, packed: Packed, first: Tensor, second: Tensor, fmt: BlockFormat, along_rows: bool) -> Tensor:
    """``v @ S^T`` (``along_rows``) or ``v @ S`` for the stored Q ``S``, plus ``v @ first @ second``."""
    total = (v @ first.to(v.dtype) @ second.to(v.dtype)).to(torch.promote_types(v.dtype, torch.float32))
    columns = v.shape[1] if along_rows else total.shape[1]
    for rows, weight in _stored_chunks(packed, fmt, columns):
        weight = weight.to(v.dtype)
        if along_rows:
            add_product_(total[:, rows], v, weight.t())
        else:
            add_product_(total, v[:, rows], weight)
    return total.to(v.dtype)


class _FrozenMap(torch.autograd.Function):
    """``x @ (Q + left @ right)^T``; keeps references to the buffers for backward, neither x nor a weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, fmt: BlockFormat, transposed: bool, *packed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(left, right, *packed)
        ctx.fmt, ctx.transposed = fmt, transposed
        with without_autocast(x):
            flat = x.reshape(-1, x.shape[-1])
            y = _product(flat, _as_packed(packed), right.t(), left.t(), fmt, along_rows=not transposed)
        return y.view(*x.shape[:-1], left.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        left, right, *packed = ctx.saved_tensors
        with without_autocast(grad_y):
            flat = grad_y.reshape(-1, grad_y.shape[-1])
            grad_x = _product(flat, _as_packed(packed), left, right, ctx.fmt, along_rows=ctx.transposed)
        return grad_x.view(*grad_y.shape[:-1], right.shape[1]), *([None] * (4 + len(packed)))


def _as_packed(buffers: tuple[Tensor, ...] | list[Tensor]) -> Packed:
    codes, scale_codes, scale_max, scale_offset = buffers
    return codes, scale_codes, scale_max, scale_offset


class PackedLinear(nn.Module):
    """``y = x @ Q^T + (x @ right^T) @ left^T + bias``, plus the task adapter when one is attached.

    Every stored tensor is a buffer with the dtype and shape of ``buffer_spec``; load them with
    ``load_state_dict``. With (rows, columns) = (in, out) if ``transposed`` else (out, in): ``codes`` int32
    [rows, words], ``scale_codes`` uint8 [rows, blocks] (int32 words when ``scale_bits != 8``), ``scale_max``
    [rows], ``scale_offset`` fp32 [1], ``lowrank_left`` [out, rank], ``lowrank_right`` [rank, in], optional
    ``bias`` fp32 [out].

    Peak bytes beyond the result: forward and backward about 12 x 2**20 for the chunk being rebuilt, and an
    fp32 copy of the result for half-precision activations.

    Raises:
        QuantError, ShapeError: as ``buffer_spec``.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_max: Tensor
    scale_offset: Tensor
    lowrank_left: Tensor
    lowrank_right: Tensor
    bias: Tensor | None
    task_a: nn.Parameter | None
    task_b: nn.Parameter | None

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        fmt: BlockFormat,
        rank: int,
        transposed: bool,
        bias: bool,
        factor_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fmt, self.rank, self.transposed = fmt, rank, transposed
        self.register_buffer("bias", None)
        spec = buffer_spec(in_features, out_features, fmt, rank, transposed, factor_dtype, bias)
        for name, (dtype, shape) in spec.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.register_parameter("task_a", None)
        self.register_parameter("task_b", None)
        self.task_scale = 0.0

    def attach_adapter(self, rank: int, alpha: float, generator: torch.Generator) -> None:
        """Add a trainable adapter: fp32 ``task_a`` [rank, in] and ``task_b`` [out, rank].

        ``task_a`` is Kaiming-uniform (a = sqrt 5) and drawn on the generator's device, ``task_b`` is zeros.
        The adapter adds ``alpha / rank * (x @ task_a^T) @ task_b^T``: nothing at first.

        Raises:
            ShapeError: rank below 1. QuantError: an adapter is already attached.
        """
        if rank < 1:
            raise ShapeError(f"adapter rank must be at least 1, found {rank}")
        if self.task_a is not None:
            raise QuantError("an adapter is already attached to this layer")
        task_a = torch.empty(rank, self.in_features, dtype=torch.float32, device=generator.device)
        nn.init.kaiming_uniform_(task_a, a=math.sqrt(5), generator=generator)
        device = self.codes.device
        self.task_a = nn.Parameter(task_a.to(device))
        self.task_b = nn.Parameter(torch.zeros(self.out_features, rank, dtype=torch.float32, device=device))
        self.task_scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed in x's dtype (autocast's dtype under autocast)."""
        check_input(x, self.in_features)
        x = autocast_input(x)
        y: Tensor = _FrozenMap.apply(  # type: ignore[no-untyped-call]
            x, self.lowrank_left, self.lowrank_right, self.fmt, self.transposed, *self._packed()
        )
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        if self.task_a is not None and self.task_b is not None:
            hidden = F.linear(x, self.task_a.to(x.dtype))
            y = y + self.task_scale * F.linear(hidden, self.task_b.to(x.dtype))
        return y

    @torch.no_grad()
    def dequantized(self, include_lowrank: bool = True) -> Tensor:
        """Dense weight, fp32 [out, in], without the task adapter.

        A row of the stored orientation depends on the buffers of that row only. The low-rank product is
        summed in fp64, where products of 16-bit factors are exact, so a row is the same bits in a full and in
        a sliced map.

        Peak bytes: 4 x out x in for the result, plus about 28 x 2**20 for the chunk being rebuilt.
        """
        columns = self.in_features if not self.transposed else self.out_features
        dense = torch.empty(self.out_features, self.in_features, dtype=torch.float32, device=self.codes.device)
        left, right = self.lowrank_left.double(), self.lowrank_right.double()
        stored, first, second = (dense.t(), right.t(), left.t()) if self.transposed else (dense, left, right)
        for rows, weight in _stored_chunks(self._packed(), self.fmt, columns):
            stored[rows] = (first[rows] @ second + weight).float() if include_lowrank else weight
        return dense

    def _packed(self) -> Packed:
        if self.scale_offset.dtype != torch.float32 or self.scale_max.dtype != self.fmt.scale_dtype:
            raise QuantError(
                f"scales were cast to {self.scale_offset.dtype} and {self.scale_max.dtype}, but a packed map "
                f"keeps torch.float32 and {self.fmt.scale_dtype}: move it between devices, keep its dtypes"
            )
        return self.codes, self.scale_codes, self.scale_max, self.scale_offset

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={self.fmt.name}, "
            f"rank={self.rank}, transposed={self.transposed}"
        )

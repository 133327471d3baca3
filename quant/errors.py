"""Error tables: what each choice would cost in quality, for the allocator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.decompose import decompose
from quant.exceptions import QuantError
from quant.lowrank import svd_lowrank
from quant.storage import Choice


def error_table(
    weight: Tensor,
    choices: Sequence[Choice],
    *,
    generator_seed: int,
    row_weight: Tensor | None = None,
    column_weight: Tensor | None = None,
    iterations: int = 1,
) -> list[float]:
    """Loss of every one of `choices` on fp32 `weight` [rows, columns], in order.

    Losses are those of `decompose` stopped after `iterations`, weighted alike. The first factorisation, by
    far the dearest step, is computed once at the largest rank and cut for the others: its directions are
    sorted. Later iterations start from a generator seeded with `generator_seed` for each choice, so an entry
    depends on the other choices only through the largest rank. Peak: that of `decompose` plus the first
    factors. Raises as `decompose`, and QuantError for iterations < 1.
    """
    if iterations < 1:
        raise QuantError(f"iterations must be positive, got {iterations}")
    largest = max((choice.rank for choice in choices), default=0)
    generator = torch.Generator().manual_seed(generator_seed)
    left, right = svd_lowrank(weight, largest, generator=generator, row_weight=row_weight, column_weight=column_weight)
    return [
        decompose(
            weight,
            choice,
            generator=torch.Generator().manual_seed(generator_seed),
            row_weight=row_weight,
            column_weight=column_weight,
            max_iterations=iterations,
            patience=iterations,
            first=(left[:, : choice.rank], right[: choice.rank]),
        ).loss
        for choice in choices
    ]

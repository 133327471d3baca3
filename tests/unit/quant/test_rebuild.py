import pytest
import torch

from quant.exceptions import ShapeError
from quant.rebuild import CHUNK_ELEMENTS, add_product_, autocast_input, row_chunks


@pytest.mark.parametrize("row_chunk", [1, 3, 10, 11, None])
def test_chunks_cover_every_row_once_in_order(row_chunk):
    rows = list(range(10))
    assert [r for chunk in row_chunks(10, 4, row_chunk) for r in rows[chunk]] == rows
    assert all(chunk.stop <= 10 for chunk in row_chunks(10, 4, row_chunk))


def test_the_default_chunk_bounds_the_weights_rebuilt_at_once():
    sizes = {chunk.stop - chunk.start for chunk in row_chunks(4096, 1024)}
    assert sizes == {CHUNK_ELEMENTS // 1024}
    assert len(list(row_chunks(2, 2 * CHUNK_ELEMENTS))) == 2
    with pytest.raises(ShapeError, match="row_chunk"):
        list(row_chunks(4, 4, 0))


def test_autocast_input_follows_autocast_and_spares_float64():
    x = torch.ones(2)
    assert autocast_input(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_input(x).dtype == torch.bfloat16
        assert autocast_input(x.double()).dtype == torch.float64


def test_half_precision_products_are_summed_in_the_dtype_of_the_total():
    total = torch.zeros(1, 1)
    small = torch.full((1, 1), 2.0**-5, dtype=torch.bfloat16)
    add_product_(total, torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    for _ in range(4):
        add_product_(total, small, small)
    assert total.item() == 1 + 4 * 2.0**-10  # bf16 totals would stay at 1
    add_product_(total, torch.full((1, 1), 2.0), torch.full((1, 1), 3.0))
    assert total.item() == 7 + 4 * 2.0**-10

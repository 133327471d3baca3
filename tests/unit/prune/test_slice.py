import pytest
import torch

from prune.exceptions import PruneError
from prune.slice import slice_bias, slice_rows_or_columns

WEIGHT = torch.arange(12).reshape(3, 4)
KEPT = torch.tensor([0, 2])


def test_rows_or_columns_by_role() -> None:
    for role in ("q", "k", "v", "gate", "up"):
        assert slice_rows_or_columns(WEIGHT, role, KEPT).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    for role in ("o", "down"):
        assert slice_rows_or_columns(WEIGHT, role, KEPT).tolist() == [[0, 2], [4, 6], [8, 10]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
def test_dtype_stays_and_the_result_is_a_copy(dtype: torch.dtype) -> None:
    weight = WEIGHT.to(dtype)
    part = slice_rows_or_columns(weight, "down", torch.arange(4))
    assert part.dtype == dtype
    assert part.is_contiguous()
    part.zero_()
    assert torch.equal(weight, WEIGHT.to(dtype))


def test_bias_follows_its_rows() -> None:
    assert slice_bias(torch.tensor([5, 6, 7]), "gate", KEPT).tolist() == [5, 7]
    for role in ("o", "down"):
        with pytest.raises(PruneError, match=f"{role} is pruned by columns, so its bias stays whole"):
            slice_bias(torch.zeros(3), role, KEPT)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (torch.tensor([2, 0]), "strictly ascending"),
        (torch.tensor([1, 1]), "strictly ascending"),
        (torch.tensor([0, 3]), r"within \[0, 3\), found 0 to 3"),
        (torch.tensor([-1, 0]), r"within \[0, 3\), found -1 to 0"),
        (torch.tensor([], dtype=torch.int64), "non-empty int64 vector"),
        (torch.tensor([0, 2], dtype=torch.int32), "non-empty int64 vector"),
        (torch.tensor([[0, 2]]), "non-empty int64 vector"),
    ],
)
def test_bad_indices(kept: torch.Tensor, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        slice_rows_or_columns(WEIGHT, "q", kept)
    with pytest.raises(PruneError, match=message):
        slice_bias(torch.zeros(3), "q", kept)


def test_bad_tensors_and_roles() -> None:
    with pytest.raises(PruneError, match=r"expected a weight \[out, in\]"):
        slice_rows_or_columns(torch.zeros(3), "q", KEPT)
    with pytest.raises(PruneError, match=r"expected a bias \[out\]"):
        slice_bias(WEIGHT, "q", KEPT)
    with pytest.raises(PruneError, match="unknown role"):
        slice_rows_or_columns(WEIGHT, "norm", KEPT)

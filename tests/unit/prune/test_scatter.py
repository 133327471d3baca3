import pytest
import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import PRUNED_AXIS, ROLES, LayerShape, shape_of
from prune.indexmap import IndexMap, LayerKept
from prune.scatter import restrict_adapter, scatter_adapter
from prune.slice import slice_rows_or_columns

RANK = 3
SCALING = 2.0
SHAPES = {
    "mha": LayerShape(hidden=10, heads=4, kv_heads=4, head_dim=3, ffn=14),
    "gqa": LayerShape(hidden=12, heads=8, kv_heads=4, head_dim=2, ffn=9),
    "mqa": LayerShape(hidden=6, heads=4, kv_heads=1, head_dim=2, ffn=11),
}
CASES = [(family, role) for family in SHAPES for role in ROLES]


def pruned(family: str) -> IndexMap:
    shape = SHAPES[family]
    return IndexMap((LayerKept(tuple(range(shape.kv_heads))[-2:], (1, 2, 5, 8)),), (shape,))


def trained_adapter(role: str, small: LayerShape) -> tuple[Tensor, Tensor]:
    out, fan_in = shape_of(role, small)
    generator = torch.Generator().manual_seed(ROLES.index(role))
    return torch.randn(RANK, fan_in, generator=generator), torch.randn(out, RANK, generator=generator)


@pytest.mark.parametrize(("family", "role"), CASES)
def test_kept_block_is_the_trained_weight_and_the_rest_is_untouched(family: str, role: str) -> None:
    index_map, full = pruned(family), shape_of(role, SHAPES[family])
    kept = index_map.kept_indices(0, role)
    a, b = trained_adapter(role, index_map.kept_shape(0))
    weight = torch.randn(full, generator=torch.Generator().manual_seed(9))

    wide_a, wide_b = scatter_adapter(a, b, role, kept, full)
    delta = wide_b @ wide_a
    assert delta.shape == weight.shape
    small = slice_rows_or_columns(weight, role, kept) + SCALING * (b @ a)
    recovered = slice_rows_or_columns(weight + SCALING * delta, role, kept)
    # fp32, values of order 10: a matrix product may sum in another order at another shape.
    torch.testing.assert_close(recovered, small, rtol=1e-5, atol=1e-5)

    outside = torch.ones(full, dtype=torch.bool)
    outside.index_fill_(0 if PRUNED_AXIS[role] == "rows" else 1, kept, False)
    assert bool((delta[outside] == 0).all())
    assert torch.equal((weight + SCALING * delta)[outside], weight[outside])


@pytest.mark.parametrize(("family", "role"), CASES)
def test_round_trip_and_identity(family: str, role: str) -> None:
    index_map, full = pruned(family), shape_of(role, SHAPES[family])
    kept = index_map.kept_indices(0, role)
    a, b = trained_adapter(role, index_map.kept_shape(0))
    back_a, back_b = restrict_adapter(*scatter_adapter(a, b, role, kept, full), role, kept)
    assert torch.equal(back_a, a)
    assert torch.equal(back_b, b)

    everything = IndexMap.identity([SHAPES[family]]).kept_indices(0, role)
    a, b = trained_adapter(role, SHAPES[family])
    same_a, same_b = scatter_adapter(a, b, role, everything, full)
    assert torch.equal(same_a, a)
    assert torch.equal(same_b, b)


def test_grouped_query_example() -> None:
    # Four query heads on two KV heads of size 2, KV head 0 removed: rows 4-7 of q, 2-3 of k.
    shape = LayerShape(hidden=3, heads=4, kv_heads=2, head_dim=2, ffn=2)
    index_map = IndexMap((LayerKept((1,), (0, 1)),), (shape,))
    for role, zero, rows in (("q", 4, 4), ("k", 2, 2)):
        b = torch.arange(1.0, rows + 1).reshape(rows, 1)
        _, wide = scatter_adapter(torch.ones(1, 3), b, role, index_map.kept_indices(0, role), (zero + rows, 3))
        assert wide[:, 0].tolist() == [0.0] * zero + b[:, 0].tolist()


@pytest.mark.parametrize("role", ["o", "down"])
def test_noise_in_place_of_zeros_would_be_seen(role: str) -> None:
    # LoRAM's released code can also fill missing columns with noise; the zero check must tell the two apart.
    index_map, full = pruned("gqa"), shape_of(role, SHAPES["gqa"])
    kept = index_map.kept_indices(0, role)
    wide_a, wide_b = scatter_adapter(*trained_adapter(role, index_map.kept_shape(0)), role, kept, full)
    noisy = torch.randn(wide_a.shape, generator=torch.Generator().manual_seed(5)) / RANK
    noisy[:, kept] = wide_a[:, kept]
    gone = torch.ones(full[1], dtype=torch.bool).index_fill(0, kept, False)
    assert bool(((wide_b @ wide_a)[:, gone] == 0).all())
    assert bool(((wide_b @ noisy)[:, gone] != 0).any())


def test_permuted_indices_are_refused() -> None:
    a, b = torch.zeros(1, 4), torch.zeros(2, 1)
    with pytest.raises(PruneError, match="strictly ascending"):
        scatter_adapter(a, b, "up", torch.tensor([3, 1]), (5, 4))
    with pytest.raises(PruneError, match="strictly ascending"):
        restrict_adapter(a, torch.zeros(5, 1), "up", torch.tensor([3, 1]))


def test_gradients_pass_only_through_kept_entries() -> None:
    a, b = torch.ones(2, 3), torch.ones(2, 2, requires_grad=True)
    _, wide = scatter_adapter(a, b, "v", torch.tensor([1, 3]), (4, 3))
    (wide * torch.arange(4.0)[:, None]).sum().backward()
    assert b.grad is not None
    assert b.grad.tolist() == [[1.0, 1.0], [3.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    a, b = torch.ones(1, 2, dtype=dtype), torch.ones(3, 1, dtype=dtype)
    wide_a, wide_b = scatter_adapter(a, b, "o", torch.tensor([0, 2]), (3, 4))
    assert (wide_a.dtype, wide_b.dtype) == (dtype, dtype)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((1, 4), (3, 1), r"2 kept of \(5, 4\) need an adapter for \(2, 4\), found one for \(3, 4\)"),
        ((1, 3), (2, 1), r"found one for \(2, 3\)"),
        ((2, 4), (2, 1), "of one rank"),
        ((4,), (2, 1), "of one rank"),
    ],
)
def test_shapes_must_agree(a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(PruneError, match=message):
        scatter_adapter(torch.zeros(a), torch.zeros(b), "q", torch.tensor([0, 3]), (5, 4))


def test_indices_beyond_the_full_shape_are_refused() -> None:
    with pytest.raises(PruneError, match=r"within \[0, 5\)"):
        scatter_adapter(torch.zeros(1, 4), torch.zeros(2, 1), "q", torch.tensor([0, 5]), (5, 4))
    with pytest.raises(PruneError, match=r"within \[0, 4\)"):
        restrict_adapter(torch.zeros(1, 4), torch.zeros(2, 1), "o", torch.tensor([0, 4]))

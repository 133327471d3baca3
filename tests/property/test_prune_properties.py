"""Laws of slicing, scattering, selecting and recording, for every shape and every choice of groups."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prune.counting import counts_without, group_parameters, kept_count, masked_count
from prune.exceptions import RatioError
from prune.groups import KIND, PRUNED_AXIS, ROLES, LayerShape, shape_of
from prune.indexmap import IndexMap, LayerKept
from prune.scatter import restrict_adapter, scatter_adapter
from prune.select import keep_best, removal_losses
from prune.slice import slice_rows_or_columns
from prune.sparse import check_mask, inverse_root, pack_mask, sparsegpt_mask, unpack_mask, wanda_mask

# Examples are tiny; a slow shared machine must not fail them.
settings.register_profile("prune", max_examples=60, deadline=None)
RELAXED = settings.get_profile("prune")

RATIOS = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)


@st.composite
def layer_shapes(draw: st.DrawFn) -> LayerShape:
    kv_heads = draw(st.integers(1, 4))
    return LayerShape(
        hidden=draw(st.integers(1, 9)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 4)),
        ffn=draw(st.integers(1, 20)),
    )


def kept_of(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    return tuple(sorted(draw(st.sets(st.integers(0, total - 1), min_size=1))))


@st.composite
def index_maps(draw: st.DrawFn, max_layers: int = 3) -> IndexMap:
    shapes = draw(st.lists(layer_shapes(), min_size=1, max_size=max_layers))
    layers = [LayerKept(kept_of(draw, shape.kv_heads), kept_of(draw, shape.ffn)) for shape in shapes]
    return IndexMap(tuple(layers), tuple(shapes))


def whole_numbers(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Small integers as fp32: sums of products are exact in any order of summation."""
    return torch.randint(-8, 9, shape, generator=generator).float()


@RELAXED
@given(index_map=index_maps(1), role=st.sampled_from(ROLES), rank=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_restrict_undoes_scatter_bit_for_bit(index_map: IndexMap, role: str, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    out, fan_in = shape_of(role, index_map.kept_shape(0))
    a = torch.randn(rank, fan_in, generator=generator)
    b = torch.randn(out, rank, generator=generator)
    kept, full = index_map.kept_indices(0, role), shape_of(role, index_map.original[0])
    wide_a, wide_b = scatter_adapter(a, b, role, kept, full)
    assert (wide_a.shape, wide_b.shape) == ((rank, full[1]), (full[0], rank))
    assert int(wide_a.count_nonzero() + wide_b.count_nonzero()) == int(a.count_nonzero() + b.count_nonzero())
    back_a, back_b = restrict_adapter(wide_a, wide_b, role, kept)
    assert torch.equal(back_a, a)
    assert torch.equal(back_b, b)


@RELAXED
@given(index_map=index_maps(1), role=st.sampled_from(ROLES), rank=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_slicing_the_sum_is_summing_the_slices(index_map: IndexMap, role: str, rank: int, seed: int) -> None:
    # (Q + L1 L2 + R(T))[I, J] = Q[I, J] + L1[I] L2[:, J] + T, exactly.
    generator = torch.Generator().manual_seed(seed)
    full, small = shape_of(role, index_map.original[0]), shape_of(role, index_map.kept_shape(0))
    kept = index_map.kept_indices(0, role)
    base = whole_numbers(full, generator)
    right, left = whole_numbers((rank, full[1]), generator), whole_numbers((full[0], rank), generator)
    a, b = whole_numbers((rank, small[1]), generator), whole_numbers((small[0], rank), generator)

    wide_a, wide_b = scatter_adapter(a, b, role, kept, full)
    composed = slice_rows_or_columns(base + left @ right + wide_b @ wide_a, role, kept)
    small_right, small_left = restrict_adapter(right, left, role, kept)
    parts = slice_rows_or_columns(base, role, kept) + small_left @ small_right + b @ a
    assert composed.shape == small
    assert torch.equal(composed, parts)


@RELAXED
@given(index_map=index_maps())
def test_members_of_a_group_share_one_fate(index_map: IndexMap) -> None:
    for layer, (kept, shape) in enumerate(zip(index_map.layers, index_map.original, strict=True)):
        small = index_map.kept_shape(layer)
        for role in ROLES:
            axis = 0 if PRUNED_AXIS[role] == "rows" else 1
            indices = index_map.kept_indices(layer, role)
            assert indices.numel() == shape_of(role, small)[axis]
            assert bool((indices[1:] > indices[:-1]).all())
            groups = kept.kv_heads if KIND[role] == "kv" else kept.ffn
            width = shape_of(role, shape)[axis] // shape.group_count(KIND[role])
            assert set((indices // width).tolist()) == set(groups)


@RELAXED
@given(index_map=index_maps(), other=index_maps())
def test_record_round_trip(index_map: IndexMap, other: IndexMap) -> None:
    again = IndexMap.from_json(json.loads(json.dumps(index_map.to_json())))
    assert again == index_map
    assert (other.digest() == index_map.digest()) == (other == index_map)


@RELAXED
@given(total=st.integers(1, 500), ratios=st.tuples(RATIOS, RATIOS), align=st.integers(1, 130))
def test_counts_are_aligned_bounded_and_monotone(total: int, ratios: tuple[float, float], align: int) -> None:
    # Half a group is the least that can be asked to stay.
    low, high = sorted(min(ratio, 1 - 1 / (2 * total) - 1e-9) for ratio in ratios)
    more, fewer = kept_count(total, low, align), kept_count(total, high, align)
    assert fewer <= more <= total
    for count, ratio in ((more, low), (fewer, high)):
        assert count == total or (count % align == 0 and count >= align)
        if align <= total:
            # Nearest multiple, unless held at one unit or the total; one half for rounding to an integer.
            assert abs(count - total * (1 - ratio)) <= align / 2 + 0.5 or count in (align, total)
    assert kept_count(total, 0.0, align) == total


@st.composite
def scored_layers(draw: st.DrawFn) -> tuple[list[LayerShape], list[dict[str, Tensor]]]:
    shapes = draw(st.lists(layer_shapes(), min_size=1, max_size=5))
    scores = []
    for shape in shapes:
        # Few distinct values, so that ties are common.
        kv = draw(st.lists(st.integers(0, 3), min_size=shape.kv_heads, max_size=shape.kv_heads))
        ffn = draw(st.lists(st.integers(0, 3), min_size=shape.ffn, max_size=shape.ffn))
        scores.append({"kv": torch.tensor(kv).double(), "ffn": torch.tensor(ffn).double()})
    return shapes, scores


@RELAXED
@given(layers=scored_layers(), data=st.data())
def test_selection_keeps_the_best_of_every_layer(
    layers: tuple[list[LayerShape], list[dict[str, Tensor]]], data: st.DataObject
) -> None:
    shapes, scores = layers
    counts = [(data.draw(st.integers(1, shape.kv_heads)), data.draw(st.integers(1, shape.ffn))) for shape in shapes]
    index_map = keep_best(scores, shapes, counts)
    for number, (kept, shape) in enumerate(zip(index_map.layers, shapes, strict=True)):
        assert (len(kept.kv_heads), len(kept.ffn)) == counts[number]
        for kind, stay in (("kv", kept.kv_heads), ("ffn", kept.ffn)):
            values = scores[number][kind]
            ranked = sorted(range(shape.group_count(kind)), key=lambda g: (-float(values[g]), g))
            assert stay == tuple(sorted(ranked[: len(stay)]))
            gone = sum(float(values[g]) for g in range(len(values)) if g not in stay)
            assert removal_losses(values, [len(stay)]) == [gone]


@RELAXED
@given(
    shape=layer_shapes(),
    align=st.integers(1, 6),
    share=st.floats(0, 1),
    biased=st.sampled_from([(), ("q", "k", "v"), ROLES]),
)
def test_what_goes_is_at_least_what_was_asked_for_and_no_group_more(
    shape: LayerShape, align: int, share: float, biased: tuple[str, ...]
) -> None:
    """Against every pair of counts: enough goes, and no wider FFN would do beside these KV groups."""
    sizes = [group_parameters(kind, shape, biased) for kind in ("kv", "ffn")]
    whole = sizes[0] * shape.kv_heads + sizes[1] * shape.ffn
    needed = round(share * whole)
    pairs = {
        (kv, ffn): whole - sizes[0] * kv - sizes[1] * ffn
        for kv in range(1, shape.kv_heads + 1)
        for ffn in {*range(align, shape.ffn, align), shape.ffn}
    }
    enough = {pair: gone for pair, gone in pairs.items() if gone >= needed}
    if not enough:
        with pytest.raises(RatioError, match="parameters are to go"):
            counts_without(shape, needed, align, biased)
        return
    found = counts_without(shape, needed, align, biased)
    assert found in enough
    assert enough[found] == min(gone for (kv, _), gone in enough.items() if kv == found[0])
    even = shape.kv_heads * (1 - needed / whole)
    near = {pair: gone for pair, gone in enough.items() if abs(pair[0] - even) < 1 - 1e-9}
    if near:
        assert enough[found] <= min(near.values())
    if needed == 0:
        assert found == (shape.kv_heads, shape.ffn)


@RELAXED
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 12),
    pattern=st.one_of(
        RATIOS.map(lambda ratio: (ratio, None)), st.sampled_from([(0.5, 2), (0.25, 4), (0.5, 4), (0.5, 8)])
    ),
    seed=st.integers(0, 2**32),
)
def test_masks_take_exactly_their_share(rows: int, groups: int, pattern: tuple[float, int | None], seed: int) -> None:
    """Of any shape, ties among the scores included; and a mask that is packed comes back."""
    (ratio, group), generator = pattern, torch.Generator().manual_seed(seed)
    columns = groups * (group or 3)
    weight = whole_numbers((rows, columns), generator)
    seen = torch.randn(2 * columns, columns, generator=generator)
    for mask in (
        wanda_mask(weight, seen.square().mean(dim=0).sqrt(), ratio, group),
        sparsegpt_mask(weight, inverse_root(seen.T @ seen, 0.01), ratio, group),
    ):
        check_mask(mask, ratio, group)
        assert int(mask.sum()) == masked_count(rows, columns, ratio) <= ratio * rows * columns + 1e-9
        assert torch.equal(unpack_mask(pack_mask(mask), columns), mask)

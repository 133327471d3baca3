import hashlib
import json
from typing import Any

import pytest
import torch

from prune.exceptions import IndexMapError, PruneError
from prune.groups import ROLES, LayerShape, shape_of
from prune.indexmap import IndexMap, LayerKept

SHAPE = LayerShape(hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=90)
FFN = (*range(64), 70, *range(72, 81))


def small_map() -> IndexMap:
    return IndexMap((LayerKept((1,), FFN), LayerKept((0, 1), tuple(range(90)))), (SHAPE, SHAPE))


def test_grouped_query_expansion() -> None:
    # Four query heads on two KV heads of size 2, KV head 0 removed.
    kept = small_map()
    assert kept.kept_indices(0, "k").tolist() == kept.kept_indices(0, "v").tolist() == [2, 3]
    assert kept.kept_indices(0, "q").tolist() == kept.kept_indices(0, "o").tolist() == [4, 5, 6, 7]
    for role in ("gate", "up", "down"):
        assert kept.kept_indices(0, role).tolist() == list(FFN)
    assert all(kept.kept_indices(0, role).dtype == torch.int64 for role in ROLES)


@pytest.mark.parametrize("heads", [(6, 6), (6, 3), (6, 1)], ids=["mha", "gqa", "mqa"])
def test_indices_match_a_walk_over_heads(heads: tuple[int, int]) -> None:
    queries, kv_heads = heads
    shape = LayerShape(hidden=5, heads=queries, kv_heads=kv_heads, head_dim=3, ffn=4)
    stay = tuple(range(0, kv_heads, 2))
    kept = IndexMap((LayerKept(stay, (0, 3)),), (shape,))
    by_query = [
        row for row in range(queries * 3) if (row // 3) // (queries // kv_heads) in stay
    ]  # row -> query head -> its KV head
    assert kept.kept_indices(0, "q").tolist() == by_query
    assert kept.kept_indices(0, "k").tolist() == [row for row in range(kv_heads * 3) if row // 3 in stay]
    small = kept.kept_shape(0)
    for role in ROLES:
        assert kept.kept_indices(0, role).numel() in shape_of(role, small)


def test_kept_shape() -> None:
    kept = small_map()
    assert kept.kept_shape(0) == LayerShape(hidden=8, heads=2, kv_heads=1, head_dim=2, ffn=74)
    assert kept.kept_shape(1) == SHAPE


def test_identity_keeps_everything() -> None:
    kept = IndexMap.identity([SHAPE, SHAPE])
    assert kept.kept_shapes == (SHAPE, SHAPE)
    for role in ROLES:
        pruned = shape_of(role, SHAPE)[1 if role in ("o", "down") else 0]
        assert kept.kept_indices(1, role).tolist() == list(range(pruned))


def test_json_reads_like_a_record() -> None:
    record = small_map().to_json()
    assert (record["schema"], record["version"]) == ("qlora_pipe.index_map", 1)
    assert record["layers"][0] == {
        "original": {"hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn": 90},
        "kv_heads": "1",
        "ffn": "0-63,70,72-80",
    }


def test_round_trip_and_digest() -> None:
    kept = small_map()
    again = IndexMap.from_json(json.loads(json.dumps(kept.to_json())))
    assert again == kept
    assert again.digest() == kept.digest()
    assert len(kept.digest()) == 64
    moved = IndexMap((LayerKept((0,), FFN), kept.layers[1]), kept.original)
    assert moved.digest() != kept.digest()


def test_digest_is_stable_across_releases() -> None:
    # Digests are written into other artifacts: a change of the canonical form must raise the version.
    kept = IndexMap((LayerKept((1,), (0, 1, 2)),), (LayerShape(8, 4, 2, 2, 4),))
    canonical = (
        '{"layers":[{"ffn":"0-2","kv_heads":"1",'
        '"original":{"ffn":4,"head_dim":2,"heads":4,"hidden":8,"kv_heads":2}}],'
        '"schema":"qlora_pipe.index_map","version":1}'
    )
    assert kept.digest() == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    ("kv_heads", "ffn", "message"),
    [
        ((1, 0), (0,), "kv_heads must be ascending and unique, found 1 then 0"),
        ((0,), (3, 3), "ffn must be ascending and unique, found 3 then 3"),
        ((), (0,), "kv_heads keeps nothing"),
        ((0,), (-1, 2), "negative index -1"),
        ([0], (0,), "kv_heads must be a tuple of integers, found list"),
        ((0,), (0.0,), "ffn must be a tuple of integers"),
    ],
)
def test_bad_indices(kv_heads: Any, ffn: Any, message: str) -> None:
    with pytest.raises(IndexMapError, match=message):
        LayerKept(kv_heads, ffn)


def test_bounds_and_lengths() -> None:
    good = LayerKept((0,), (0,))
    with pytest.raises(IndexMapError, match="layer 1: kv_heads keeps index 2, but the original has 2"):
        IndexMap((good, LayerKept((2,), (0,))), (SHAPE, SHAPE))
    with pytest.raises(IndexMapError, match="ffn keeps index 90"):
        IndexMap((LayerKept((0,), (90,)),), (SHAPE,))
    with pytest.raises(IndexMapError, match="found 1 and 2"):
        IndexMap((good,), (SHAPE, SHAPE))
    with pytest.raises(IndexMapError, match="at least one"):
        IndexMap((), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5-3", "'5-3' is not within 0-89"),
        ("0-999999999", "is not within 0-89"),
        ("0-90", "'0-90' is not within 0-89"),
        ("4-6,6", "ascending and disjoint"),
        ("7,2", "ascending and disjoint"),
        ("1,,2", "expected ascending ranges"),
        ("", "expected ascending ranges"),
        ("-3", "expected ascending ranges"),
        ([1, 2], "expected ascending ranges"),
    ],
)
def test_bad_ranges(text: Any, message: str) -> None:
    record = small_map().to_json()
    record["layers"][1]["ffn"] = text
    with pytest.raises(IndexMapError, match=f"layer 1: .*{message}"):
        IndexMap.from_json(record)


def test_bad_records() -> None:
    record = small_map().to_json()
    with pytest.raises(IndexMapError, match="expected the schema"):
        IndexMap.from_json(record | {"schema": "other"})
    with pytest.raises(IndexMapError, match="reads version 1, found 2"):
        IndexMap.from_json(record | {"version": 2})
    with pytest.raises(IndexMapError, match="must have the keys"):
        IndexMap.from_json(record | {"extra": 1})
    with pytest.raises(IndexMapError, match="layers must be a list"):
        IndexMap.from_json(record | {"layers": {}})
    with pytest.raises(IndexMapError, match="layer 0: entry must be a mapping"):
        IndexMap.from_json(record | {"layers": [3]})
    record["layers"][1]["original"]["heads"] = 3
    with pytest.raises(IndexMapError, match="layer 1: heads must be a multiple"):
        IndexMap.from_json(record)


def test_unknown_role() -> None:
    with pytest.raises(PruneError, match="unknown role"):
        small_map().kept_indices(0, "norm")

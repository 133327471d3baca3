import pytest

from prune.exceptions import PruneError
from prune.groups import KIND, PRUNED_AXIS, ROLES, LayerShape, group_width, pruned_dim, shape_of

GQA = LayerShape(hidden=20, heads=6, kv_heads=2, head_dim=4, ffn=10)


def test_every_role_has_an_axis_and_a_kind() -> None:
    assert set(PRUNED_AXIS) == set(KIND) == set(ROLES)
    assert {role for role in ROLES if PRUNED_AXIS[role] == "columns"} == {"o", "down"}
    assert {role for role in ROLES if KIND[role] == "ffn"} == {"gate", "up", "down"}
    assert [pruned_dim(role) for role in ROLES] == [0, 0, 0, 1, 0, 0, 1]


def test_shapes_when_attention_width_differs_from_hidden() -> None:
    assert {role: shape_of(role, GQA) for role in ROLES} == {
        "q": (24, 20),
        "k": (8, 20),
        "v": (8, 20),
        "o": (20, 24),
        "gate": (10, 20),
        "up": (10, 20),
        "down": (20, 10),
    }


def test_group_widths() -> None:
    assert GQA.queries_per_kv == 3
    assert [group_width(role, GQA) for role in ROLES] == [12, 4, 4, 12, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "multiple of kv_heads"),
        ({"ffn": 0}, "ffn must be a positive integer, found 0"),
        ({"hidden": 2.0}, "hidden must be a positive integer"),
        ({"head_dim": True}, "head_dim must be a positive integer"),
    ],
)
def test_bad_widths(change: dict[str, int], message: str) -> None:
    widths = {"hidden": 20, "heads": 6, "kv_heads": 2, "head_dim": 4, "ffn": 10}
    with pytest.raises(PruneError, match=message):
        LayerShape(**(widths | change))


def test_unknown_role() -> None:
    with pytest.raises(PruneError, match="unknown role 'qkv'"):
        shape_of("qkv", GQA)
    with pytest.raises(PruneError, match="unknown role"):
        pruned_dim("embed")

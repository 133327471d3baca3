import pytest
import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import ROLES, LayerShape, shape_of
from prune.saliency import GroupScores, activation, random, wanda

# One in each attention family; 300 channels cross the row block of the reduction.
SHAPES = {
    "mha": LayerShape(hidden=7, heads=3, kv_heads=3, head_dim=2, ffn=5),
    "gqa": LayerShape(hidden=6, heads=6, kv_heads=2, head_dim=3, ffn=300),
    "mqa": LayerShape(hidden=5, heads=4, kv_heads=1, head_dim=2, ffn=4),
}


def layer_weights(shape: LayerShape, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        role: torch.randn(shape_of(role, shape), generator=generator) * (1 + 10 * place)
        for place, role in enumerate(ROLES)
    }


def magnitude(weights: dict[str, Tensor], shape: LayerShape) -> dict[str, Tensor]:
    gathered = GroupScores(shape)
    for role, weight in weights.items():
        gathered.add(role, weight)
    return gathered.scores()


def slow_magnitude(weights: dict[str, Tensor], shape: LayerShape) -> dict[str, list[float]]:
    """Entry by entry in Python floats: find the group of an entry, add its share of its weight."""
    scores = {"kv": [0.0] * shape.kv_heads, "ffn": [0.0] * shape.ffn}
    for role, weight in weights.items():
        rows = weight.tolist()
        total = sum(value * value for row in rows for value in row)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                place = j if role in ("o", "down") else i
                if role in ("gate", "up", "down"):
                    kind, group = "ffn", place
                elif role in ("k", "v"):
                    kind, group = "kv", place // shape.head_dim
                else:
                    kind, group = "kv", (place // shape.head_dim) // (shape.heads // shape.kv_heads)
                scores[kind][group] += value * value / total
    return scores


@pytest.mark.parametrize("family", SHAPES)
def test_magnitude_is_the_slow_loop(family: str) -> None:
    shape = SHAPES[family]
    weights = layer_weights(shape)
    fast, slow = magnitude(weights, shape), slow_magnitude(weights, shape)
    for kind in ("kv", "ffn"):
        assert fast[kind].dtype == torch.float64
        # fp64 on both sides; only the order of summation differs.
        exact = torch.tensor(slow[kind], dtype=torch.float64)
        torch.testing.assert_close(fast[kind], exact, rtol=1e-12, atol=0)
    assert float(fast["kv"].sum()) == pytest.approx(4, rel=1e-12)
    assert float(fast["ffn"].sum()) == pytest.approx(3, rel=1e-12)


def test_a_query_head_scores_for_its_own_kv_head() -> None:
    shape = LayerShape(hidden=4, heads=8, kv_heads=2, head_dim=2, ffn=3)
    for query_head in range(8):
        weights = {role: torch.zeros(shape_of(role, shape)) for role in ROLES}
        weights["q"][query_head * 2 + 1, 3] = 5.0
        expected = [0.0, 0.0]
        expected[query_head // 4] = 1.0
        assert magnitude(weights, shape)["kv"].tolist() == expected


def test_weights_are_comparable_whatever_their_scale() -> None:
    shape = SHAPES["gqa"]
    weights = layer_weights(shape)
    before = magnitude(weights, shape)
    # Powers of two scale every square exactly.
    after = magnitude({role: weight * 2.0**place for place, (role, weight) in enumerate(weights.items())}, shape)
    assert all(torch.equal(before[kind], after[kind]) for kind in before)


def test_one_weight_at_a_time_in_any_order_and_dtype() -> None:
    shape = SHAPES["gqa"]
    weights = {role: weight.bfloat16() for role, weight in layer_weights(shape).items()}
    gathered = GroupScores(shape)
    for role in reversed(ROLES):
        gathered.add(role, weights[role])
    whole = magnitude({role: weight.float() for role, weight in weights.items()}, shape)
    assert all(torch.equal(gathered.scores()[kind], whole[kind]) for kind in whole)


def test_a_zero_weight_adds_nothing_and_nan_is_visible() -> None:
    shape = SHAPES["mha"]
    weights = layer_weights(shape)
    weights["o"] = torch.zeros(shape_of("o", shape))
    assert float(magnitude(weights, shape)["kv"].sum()) == pytest.approx(3, rel=1e-12)
    weights["up"][0, 0] = torch.inf
    assert bool(magnitude(weights, shape)["ffn"].isnan().any())


def test_input_is_not_changed() -> None:
    shape = SHAPES["mha"]
    weights = {role: weight.double() for role, weight in layer_weights(shape).items()}
    copies = {role: weight.clone() for role, weight in weights.items()}
    magnitude(weights, shape)
    assert all(torch.equal(weights[role], copies[role]) for role in ROLES)


def test_members_must_be_complete_single_and_well_shaped() -> None:
    shape = SHAPES["gqa"]
    weights = layer_weights(shape)
    without_v = {role: weight for role, weight in weights.items() if role != "v"}
    with pytest.raises(PruneError, match="no weight was added for v"):
        magnitude(without_v, shape)
    with pytest.raises(PruneError, match=r"down must have shape \(6, 300\), found \(300, 6\)"):
        magnitude(weights | {"down": weights["down"].T}, shape)
    gathered = GroupScores(shape)
    gathered.add("q", weights["q"])
    with pytest.raises(PruneError, match="q was added twice"):
        gathered.add("q", weights["q"])
    with pytest.raises(PruneError, match="unknown role"):
        gathered.add("router", weights["q"])


def test_random_follows_its_generator() -> None:
    shape = SHAPES["gqa"]
    first = random(shape, torch.Generator().manual_seed(3))
    again = random(shape, torch.Generator().manual_seed(3))
    other = random(shape, torch.Generator().manual_seed(4))
    assert {kind: tuple(values.shape) for kind, values in first.items()} == {"kv": (2,), "ffn": (300,)}
    assert all(values.dtype == torch.float64 for values in first.values())
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    assert not torch.equal(first["ffn"], other["ffn"])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("role", ["o", "down"])
def test_activation_is_the_expected_output_change(role: str, shape: LayerShape) -> None:
    weight = layer_weights(shape)[role]
    # Inputs that are exactly uncorrelated: one feature at a time.
    inputs = torch.diag(torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)))
    found = activation(role, weight, inputs.square().mean(dim=0), shape)
    groups = torch.arange(weight.shape[1]) // (weight.shape[1] // len(found))
    for group in range(len(found)):
        removed = inputs.double() * (groups == group)
        expected = (removed @ weight.double().T).square().sum(dim=1).mean()
        torch.testing.assert_close(found[group], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("role", ["q", "gate"])
def test_activation_refuses_roles_whose_rows_are_pruned(role: str) -> None:
    shape = SHAPES["gqa"]
    weight = layer_weights(shape)[role]
    with pytest.raises(PruneError, match="expected o or down"):
        activation(role, weight, torch.ones(weight.shape[1]), shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("role", ["o", "down"])
def test_wanda_is_the_slow_loop(role: str, shape: LayerShape) -> None:
    weight = layer_weights(shape)[role]
    squares = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1))
    found = wanda(role, weight, squares, shape)
    slow, width = [0.0] * len(found), weight.shape[1] // len(found)
    for row in weight.tolist():
        for j, value in enumerate(row):
            slow[j // width] += abs(value) * float(squares[j].double()) ** 0.5
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64), rtol=1e-12, atol=0)


def test_moments_must_fit_and_not_be_negative() -> None:
    shape = SHAPES["gqa"]
    weight = layer_weights(shape)["down"]
    for score in (activation, wanda):
        with pytest.raises(PruneError, match="expected o or down"):
            score("up", layer_weights(shape)["up"], torch.ones(6), shape)
        with pytest.raises(PruneError, match=r"its 300 input moments, found down with \(6, 300\) and \(6,\)"):
            score("down", weight, torch.ones(6), shape)
        with pytest.raises(PruneError, match="down: mean squares and variances are not negative, found -2"):
            score("down", weight, torch.full((300,), -2.0), shape)


@pytest.mark.parametrize("role", ["o", "down"])
def test_weighing_outputs_is_scaling_rows(role: str) -> None:
    """Scores with gradients are those of the rows scaled by their roots: E[x_j^2] g_i^2 W_ij^2, summed."""
    shape = LayerShape(hidden=300, heads=4, kv_heads=2, head_dim=3, ffn=7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape_of(role, shape), generator=generator)
    squares, gradients = (torch.rand(size, generator=generator) for size in (weight.shape[1], 300))
    scaled = weight.double() * gradients.double().sqrt()[:, None]
    for score in (activation, wanda):
        found = score(role, weight, squares, shape, gradients)
        torch.testing.assert_close(found, score(role, scaled, squares, shape))
        torch.testing.assert_close(
            score(role, weight, squares, shape, torch.ones(300)), score(role, weight, squares, shape)
        )
    with pytest.raises(PruneError, match="expected 300 mean squares"):
        activation(role, weight, squares, shape, gradients[1:])
    with pytest.raises(PruneError, match="none negative"):
        wanda(role, weight, squares, shape, -gradients)

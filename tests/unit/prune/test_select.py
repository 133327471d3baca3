import pytest
import torch
from torch import Tensor

from prune.exceptions import PruneError, RatioError
from prune.groups import LayerShape
from prune.select import select

SHAPE = LayerShape(hidden=8, heads=8, kv_heads=4, head_dim=2, ffn=12)


def scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"kv": torch.randperm(4, generator=generator), "ffn": torch.randperm(12, generator=generator)}


def test_highest_scores_stay() -> None:
    layer = {
        "kv": torch.tensor([0.1, 4.0, 2.0, 3.0]),
        "ffn": torch.tensor([0.0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 0]),
    }
    kept = select([layer], [SHAPE], kv_ratio=0.5, ffn_ratio=0.5, align=4)
    assert kept.layers[0].kv_heads == (1, 3)
    assert kept.layers[0].ffn == (1, 3, 4, 5, 6, 7, 8, 9)


def test_ties_go_to_the_lower_index() -> None:
    flat = {"kv": torch.ones(4), "ffn": torch.tensor([1.0] * 5 + [2.0] + [1.0] * 6)}
    kept = select([flat], [SHAPE], kv_ratio=0.5, ffn_ratio=0.75, align=1)
    assert kept.layers[0].kv_heads == (0, 1)
    assert kept.layers[0].ffn == (0, 1, 5)


def test_protected_layers_stay_whole_and_are_not_read() -> None:
    layers = [{}, scores(1), scores(2), {}, {}]
    kept = select(layers, [SHAPE] * 5, kv_ratio=0.5, ffn_ratio=0.25, align=3, protect_first=1, protect_last=2)
    assert [len(layer.kv_heads) for layer in kept.layers] == [4, 2, 2, 4, 4]
    assert [len(layer.ffn) for layer in kept.layers] == [12, 9, 9, 12, 12]


def test_protecting_every_layer_is_refused_only_when_something_should_go() -> None:
    arguments = {"align": 1, "protect_first": 1, "protect_last": 1}
    with pytest.raises(RatioError, match="1 first and 1 last protected layers cover all 2 layers"):
        select([scores()] * 2, [SHAPE] * 2, kv_ratio=0.0, ffn_ratio=0.5, **arguments)
    kept = select([scores()] * 2, [SHAPE] * 2, kv_ratio=0.0, ffn_ratio=0.0, **arguments)
    assert kept.kept_shape(0) == kept.kept_shape(1) == SHAPE


def test_bad_scores_name_their_layer() -> None:
    good, spoiled, short = scores(), scores(), scores()
    spoiled["ffn"] = spoiled["ffn"].double().index_fill(0, torch.tensor([5]), torch.nan)
    short["kv"] = short["kv"][:3]
    for bad, message in (
        (spoiled, "layer 1: ffn scores contain NaN"),
        (short, r"layer 1: kv scores must have shape \(4,\), found \(3,\)"),
        ({"kv": good["kv"]}, "layer 1 has no ffn scores"),
    ):
        with pytest.raises(PruneError, match=message):
            select([good, bad], [SHAPE] * 2, kv_ratio=0.5, ffn_ratio=0.5, align=1)


def test_bad_arguments() -> None:
    with pytest.raises(PruneError, match="scores for 2 layers, found 1"):
        select([scores()], [SHAPE] * 2, kv_ratio=0.5, ffn_ratio=0.5, align=1)
    with pytest.raises(PruneError, match="must not be negative"):
        select([scores()], [SHAPE], kv_ratio=0.5, ffn_ratio=0.5, align=1, protect_last=-1)
    with pytest.raises(RatioError, match=r"layer 0, kv: ratio 0\.95 would remove all of 4.*is 0\.875"):
        select([scores()], [SHAPE], kv_ratio=0.95, ffn_ratio=0.5, align=1)

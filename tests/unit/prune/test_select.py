import pytest
import torch
from torch import Tensor

from prune.exceptions import PruneError
from prune.groups import LayerShape
from prune.select import keep_best, removal_losses

SHAPE = LayerShape(hidden=8, heads=8, kv_heads=4, head_dim=2, ffn=12)


def scores(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"kv": torch.randperm(4, generator=generator), "ffn": torch.randperm(12, generator=generator)}


def test_highest_scores_stay() -> None:
    layer = {
        "kv": torch.tensor([0.1, 4.0, 2.0, 3.0]),
        "ffn": torch.tensor([0.0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 0, 0]),
    }
    kept = keep_best([layer], [SHAPE], [(2, 8)])
    assert kept.layers[0].kv_heads == (1, 3)
    assert kept.layers[0].ffn == (1, 3, 4, 5, 6, 7, 8, 9)


def test_ties_go_to_the_lower_index() -> None:
    flat = {"kv": torch.ones(4), "ffn": torch.tensor([1.0] * 5 + [2.0] + [1.0] * 6)}
    kept = keep_best([flat], [SHAPE], [(2, 3)])
    assert kept.layers[0].kv_heads == (0, 1)
    assert kept.layers[0].ffn == (0, 1, 5)


def test_whole_layers_are_not_read() -> None:
    kept = keep_best([{}, scores(1), {}], [SHAPE] * 3, [(4, 12), (4, 9), (4, 12)])
    assert [len(layer.kv_heads) for layer in kept.layers] == [4, 4, 4]
    assert [len(layer.ffn) for layer in kept.layers] == [12, 9, 12]
    assert kept.kept_shape(0) == kept.kept_shape(2) == SHAPE


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_scores_name_their_layer_and_kind(value: float) -> None:
    good, spoiled, short = scores(), scores(), scores()
    spoiled["ffn"] = spoiled["ffn"].double().index_fill(0, torch.tensor([5]), value)
    short["kv"] = short["kv"][:3]
    for bad, message in (
        (spoiled, "layer 1: ffn scores contain NaN or infinity"),
        (short, r"layer 1: kv scores must have shape \(4,\), found \(3,\)"),
        ({"kv": good["kv"]}, "layer 1 has no ffn scores"),
    ):
        with pytest.raises(PruneError, match=message):
            keep_best([good, bad], [SHAPE] * 2, [(2, 6)] * 2)


def test_bad_arguments() -> None:
    with pytest.raises(PruneError, match="scores and counts for 2 layers, found 1 and 2"):
        keep_best([scores()], [SHAPE] * 2, [(2, 6)] * 2)
    for counts, message in (((0, 6), "1 to 4 kv groups to stay, found 0"), ((2, 13), "1 to 12 ffn groups .* found 13")):
        with pytest.raises(PruneError, match=f"layer 0: expected {message}"):
            keep_best([scores()], [SHAPE], [counts])
    with pytest.raises(PruneError, match=r"counts from 0 to 3, found \[4\]"):
        removal_losses(torch.ones(3), [4])


def test_what_goes_is_what_scores_least() -> None:
    assert removal_losses(torch.tensor([4.0, -1.0, 2.0, 8.0]), [0, 1, 2, 3, 4]) == [13.0, 5.0, 1.0, -1.0, 0.0]

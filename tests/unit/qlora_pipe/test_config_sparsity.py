"""Which settings go with single entries, and what is said of those that do not."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_pipe.config import Config, Prune
from qlora_pipe.config_file import resolved_yaml
from qlora_pipe.config_yaml import parse_yaml

SMALLEST: dict[str, Any] = {
    "model": "m",
    "data": {"calibration": "a.txt", "task": "b.txt"},
    "compact": {"enabled": False},
}


def config(sparsity: dict[str, Any], prune: dict[str, Any] | None = None, **settings: Any) -> Config:
    return Config.model_validate({**SMALLEST, "prune": {"sparsity": sparsity, **(prune or {})}, **settings})


def test_patterns_and_their_ratios() -> None:
    assert not Prune().sparsity.enabled
    assert (Prune().ffn_ratio, Prune().removes) == (0, False)
    for pattern, ratio, group in (("unstructured", 0.55, None), ("2:4", 0.5, 4), ("4:8", 0.5, 8)):
        prune = config({"pattern": pattern}).prune
        assert (prune.sparsity.ratio, prune.sparsity.group, prune.sparsity.by) == (ratio, group, "sparsegpt")
        assert prune.sparsity.enabled
        assert (prune.kv_ratio, prune.ffn_ratio, prune.removes) == (0, 0, False)
    assert config({"pattern": "unstructured", "ratio": 0.3}).prune.sparsity.ratio == 0.3


@pytest.mark.parametrize("sparsity", [{"pattern": "4:8"}, {"pattern": "unstructured", "ratio": 0.6, "by": "wanda"}])
def test_what_a_run_writes_down_is_read_back(sparsity: dict[str, Any]) -> None:
    known = config(sparsity)
    assert Config.model_validate(parse_yaml(resolved_yaml(known))[0]) == known


def test_lorams_preset_is_what_it_publishes_for_entries() -> None:
    """No layer protected, nothing of structure; 55 % by SparseGPT, or 4:8."""
    assert config({"pattern": "unstructured"}, {"preset": "loram"}).prune.model_copy(update={"preset": None}) == (
        config({"pattern": "unstructured"}).prune
    )
    structured = {"preset": "loram", "kv_ratio": 0.5, "ffn_ratio": 0.5, "sparsity": {"pattern": "none"}}
    assert Prune.model_validate(structured).protect_first == 4


@pytest.mark.parametrize(
    ("sparsity", "prune", "settings", "message"),
    [
        (
            {"pattern": "2:4", "ratio": 0.6},
            {},
            {},
            r"2:4 leaves out 0\.5 of the entries: leave ratio out, or set pattern",
        ),
        ({"pattern": "unstructured", "ratio": 0.0}, {}, {}, "greater than 0"),
        ({"pattern": "1:2"}, {}, {}, "'none', 'unstructured', '2:4' or '4:8'"),
        ({"pattern": "2:4", "by": "magnitude"}, {}, {}, "'sparsegpt' or 'wanda'"),
        (
            {"pattern": "2:4"},
            {"ffn_ratio": 0.25},
            {},
            r"about whole groups are ffn_ratio: .* sparsity\.pattern to none",
        ),
        ({"pattern": "2:4"}, {"ratio": 0.1, "align": 8}, {}, "groups are ratio, align: leave them out, or set"),
        ({"pattern": "2:4"}, {"method": "lora", "kv_ratio": 0.1}, {}, "groups are method, kv_ratio:"),
        ({"pattern": "2:4"}, {"protect_first": 4, "protect_last": 2}, {}, "groups are protect_first, protect_last:"),
        ({"pattern": "2:4"}, {"rounding": "loram"}, {}, "groups are rounding:"),
        ({"pattern": "2:4"}, {"ratio": 0.1, "widths": "allocated"}, {}, "groups are ratio, widths:"),
        ({"pattern": "2:4"}, {}, {"compact": {}}, r"dense and as large as the whole .*set compact\.enabled to false"),
        (
            {"pattern": "2:4"},
            {},
            {"calibrate": {"covariance": False}},
            r"covariance of the inputs.*calibrate\.covarian",
        ),
        ({"pattern": "2:4"}, {}, {"refine": {"enabled": True}}, r"refine moves the level that stands for it"),
        (
            {"pattern": "2:4"},
            {},
            {"refine": {"enabled": True}, "decompose": {"grids": ["int", "nf"]}},
            r"set refine\.enabled to false, or decompose\.grids to int or uint",
        ),
    ],
)
def test_refused(sparsity: dict[str, Any], prune: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(sparsity, prune, **settings)


def test_integer_grids_may_be_refined() -> None:
    """Their levels are integers, and stay."""
    config({"pattern": "2:4"}, refine={"enabled": True}, decompose={"grids": ["int", "uint"]})
    config({"pattern": "none"}, calibrate={"covariance": False}, decompose={"metric": "fisher"})

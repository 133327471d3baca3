import math
import random
from dataclasses import replace
from typing import Any

import pytest
from tiny import SIZES

from prune.groups import shape_of
from qlora_pipe import layouts
from qlora_pipe.architectures import SITE, Architecture, from_config
from qlora_pipe.artifacts.layout import file_bytes, folder_files
from qlora_pipe.config import Config
from qlora_pipe.errors import ConfigError
from qlora_pipe.known import (
    CHAIN,
    Known,
    choices_for,
    estimate_allocation,
    fixed_bytes,
    linear_budget,
)
from qlora_pipe.shapes import check_shapes
from quant.storage import Choice

TINY = SIZES | {"model_type": "qwen2"}
SETTINGS: dict[str, Any] = {
    "model": "owner/name",
    "data": {"calibration": "a.txt", "task": "b.txt"},
    "decompose": {"bits": (2, 3, 4), "block_sizes": (16, 32), "ranks": (0, 4), "budget": "6bits"},
    "prune": {"kv_ratio": 0.5, "ffn_ratio": 0.3, "align": 32},
    "train": {"rank": 5},
    "compact": {"rank": 3, "group_size": 32},
}


def configure(**changes: Any) -> Config:
    settings = dict(SETTINGS)
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return Config.model_validate(settings)


@pytest.fixture
def tiny() -> Architecture:
    return from_config(TINY)


def knowing(tiny: Architecture, dtypes: dict[str, str] | None = None, **changes: Any) -> Known:
    config = configure(**changes)
    return Known(config, tiny, dtypes or {}, estimate_allocation(tiny, dtypes or {}, config), False)


def random_allocation(architecture: Architecture, config: Config, seed: int) -> dict[str, Choice]:
    chooser = random.Random(seed)
    return {
        name: chooser.choice(choices_for(architecture, role, layer, config))
        for layer, role, name in architecture.linears()
    }


def test_choices_fit_the_axis_that_pruning_leaves_alone(tiny: Architecture) -> None:
    config = configure(decompose={"block_sizes": (32, 64, 96, 192), "ranks": (0, 31, 32, 64)})
    blocks = {role: {choice.block_size for choice in choices_for(tiny, role, 0, config)} for role in ("q", "o", "down")}
    # q is [64, 64] with blocks along its 64 inputs; o and down are stored transposed, blocks along the 64 outputs.
    assert blocks == {"q": {32, 64}, "o": {32, 64}, "down": {32, 64}}
    assert {choice.rank for choice in choices_for(tiny, "k", 0, config)} == {0, 31}
    assert {choice.rank for choice in choices_for(tiny, "down", 0, config)} == {0, 31, 32}


@pytest.mark.parametrize(("changes", "word"), [({"block_sizes": (48,)}, "divides 64"), ({"ranks": (32,)}, "below 32")])
def test_no_choice_is_left(tiny: Architecture, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=f"no configuration fits the . projection.*{word}"):
        check_shapes(tiny, configure(decompose=changes))


def test_groups_must_divide_what_pruning_leaves(tiny: Architecture) -> None:
    check_shapes(tiny, configure())
    wide = {"group_size": 64}
    # The pruned o projection has 32 inputs.
    with pytest.raises(ConfigError, match="group_size 64 does not divide the 32 inputs of the pruned o projection"):
        check_shapes(tiny, configure(compact=wide))
    check_shapes(tiny, configure(compact={**wide, "enabled": False}))
    check_shapes(tiny, configure(compact=wide, prune={"kv_ratio": 0.0, "align": 64}))


def test_a_budget_in_bits_is_per_weight_of_the_linear_maps(tiny: Architecture) -> None:
    assert linear_budget(tiny, {}, configure(decompose={"budget": "4bits"})) == tiny.linear_weights() // 2
    assert linear_budget(tiny, {}, configure(decompose={"budget": "2.5bits"})) == int(2.5 * tiny.linear_weights() / 8)


def test_a_budget_in_bytes_is_of_the_whole_file(tiny: Architecture) -> None:
    fixed = fixed_bytes(tiny, {}, configure())
    assert linear_budget(tiny, {}, configure(decompose={"budget": f"{fixed + 100}B"})) == 100
    assert linear_budget(tiny, {}, configure(decompose={"budget": f"{fixed}B"})) == 0
    halves = dict.fromkeys(tiny.others(), "BF16")
    saved = 2 * sum(math.prod(shape) for shape in tiny.others().values())
    # Names of dtypes, digits of offsets and the header's padding aside.
    assert abs(fixed_bytes(tiny, halves, configure()) - (fixed - saved)) < 24 * len(halves)


@pytest.mark.parametrize("tied", [True, False])
def test_packed_tables_are_what_a_budget_in_bytes_counts(tied: bool) -> None:
    architecture = from_config(TINY | {"tie_word_embeddings": tied})
    kept, packed = ({"decompose": {"embeddings": value}} for value in ("keep", "int8"))
    # Per table: fp32 weights before; codes, a float16 scale for each row of 64 and 256 levels after.
    saved = (1 if tied else 2) * (260 * 64 * 4 - (260 * 64 + 2 * 260 + 256 * 4))
    before, after = (knowing(architecture, **change) for change in (kept, packed))
    for stage in ("decomposed", "pruned"):
        layouts_of = [getattr(known, stage)() for known in (before, after)]
        found = [layouts.tensor_bytes(layout) for layout in layouts_of]
        assert found[0] - found[1] == saved
        linears = [layouts.linear_bytes(layout, architecture) for layout in layouts_of]
        assert linears[0] == linears[1]
    fixed = [fixed_bytes(architecture, {}, configure(**change)) for change in (kept, packed)]
    # Entries of the header aside.
    assert abs(fixed[0] - fixed[1] - saved) < 1000
    assert set(after.tables()) == ({"model.embed_tokens"} if tied else {"model.embed_tokens", "lm_head"})
    assert set(after.outer()) & set(architecture.others()) == set(architecture.others()) - {
        f"{name}.weight" for name in after.tables()
    }
    assert before.outer() == layouts.others(architecture, {})
    assert after.integers() == before.integers()


@pytest.mark.parametrize(
    ("hidden", "block"), [(64, 64), (576, 96), (2048, 128), (960, 120), (50, 50), (8, 8), (131, 131), (2 * 131, 262)]
)
def test_blocks_of_a_table_divide_the_hidden_axis(hidden: int, block: int) -> None:
    architecture = from_config(TINY | {"hidden_size": hidden, "head_dim": 16})
    shape = layouts.tables(architecture, "int8")["model.embed_tokens"]
    assert (shape.in_features, shape.out_features, shape.transposed) == (hidden, 260, False)
    assert shape.choice == Choice("int", 8, block, 0, 16, "float16")


NARROW = TINY | {"hidden_size": 16, "intermediate_size": 48, "head_dim": 4, "num_hidden_layers": 30}
SHARDED = TINY | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 33,
    "num_attention_heads": 64,
    "head_dim": 128,
}


@pytest.mark.parametrize("sizes", [TINY, NARROW, SHARDED])
@pytest.mark.parametrize("bits", [(2, 3, 4), (3, 4), (2, 8)])
@pytest.mark.parametrize("grids", [("nf",), ("nf", "uint"), ("int", "lloyd"), ("int", "uint")])
@pytest.mark.parametrize("embeddings", ["keep", "int8"])
def test_a_budget_in_bytes_leaves_room_for_the_longest_header(
    sizes: dict[str, Any], bits: tuple[int, ...], grids: tuple[str, ...], embeddings: str
) -> None:
    """Whatever is chosen, all but the linear maps takes at most the fixed bytes; not much less either."""
    architecture = from_config(sizes)
    settings = {"grids": grids, "bits": bits, "block_sizes": (16, 32, 64), "ranks": (0, 3), "embeddings": embeddings}
    config = configure(decompose=settings)
    fixed = fixed_bytes(architecture, {}, config)
    uniform = [
        dict.fromkeys((name for _, _, name in architecture.linears()), choice)
        for choice in choices_for(architecture, "k", 0, config)
    ]
    spare = []
    for allocation in uniform + [random_allocation(architecture, config, seed) for seed in range(10)]:
        tensors = layouts.decomposed(architecture, {}, allocation, embeddings)
        spare.append(fixed - sum(folder_files(tensors).values()) + layouts.linear_bytes(tensors, architecture))
    assert min(spare) >= 0
    # 60 bytes of a tensor's entry in each of header and index; grids may differ in two tensors of each map.
    assert max(spare) < 120 * len(tensors) + (400 * len(allocation) if len(grids) > 1 else 0)


def test_choices_of_every_grid_are_stored_as_their_readers_expect(tiny: Architecture) -> None:
    settings = {"grids": ("uint", "nf", "int", "lloyd"), "bits": (4,), "scale_bits": (4,), "factor_dtype": "int8"}
    config = configure(decompose=settings | {"scale_dtypes": ("float32",), "superblocks": (8,), "block_sizes": (16,)})
    found = {choice.grid: choice for choice in choices_for(tiny, "q", 0, config) if choice.rank}
    for grid in ("int", "uint"):
        assert found[grid] == Choice(grid, 4, 16, 4, 16, "float16", None, "int8")
    for grid in ("nf", "lloyd"):
        assert found[grid] == Choice(grid, 4, 16, 4, 4, "float32", 8, "int8")


def test_superblocks_must_divide_the_blocks(tiny: Architecture) -> None:
    # q is [64, 64]: 256 blocks of 16, 128 of 32.
    def blocks(superblock: int) -> set[int]:
        config = configure(decompose={"superblocks": (superblock,)})
        return {choice.block_size for choice in choices_for(tiny, "q", 0, config)}

    assert (blocks(128), blocks(256)) == ({16, 32}, {16})
    with pytest.raises(ConfigError, match=r"a superblock that divides the matrix's blocks \(have \[96\]\)"):
        blocks(96)


def test_pruning_materialises_scales_of_superblocks_across_rows(tiny: Architecture) -> None:
    known = knowing(tiny, decompose={"superblocks": (8,)})
    name = "model.layers.0.self_attn.q_proj"
    assert known.decomposed()[f"{name}.scale_max"].shape == (known.allocation[name].superblocks(64, 64),)
    small = known.pruned()
    assert f"{name}.scale_max" not in small
    blocks = 64 // known.allocation[name].block_size
    assert (small[f"{name}.scale"].dtype, small[f"{name}.scale"].shape) == ("F32", (32, blocks))
    assert "scale" not in knowing(tiny).packed_shape("prune", 0, "q").buffers()


def test_the_estimate_is_the_dearest_that_fits(tiny: Architecture) -> None:
    costs = []
    for bits in (4, 5, 6, 7):
        known = knowing(tiny, decompose={"budget": f"{bits}bits"})
        assert not known.allocation_is_final
        costs.append(layouts.linear_bytes(known.decomposed(), tiny))
        assert costs[-1] <= linear_budget(tiny, {}, known.config)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    known = knowing(tiny, decompose={"budget": "30bits"})
    assert set(known.allocation.values()) == {Choice("lloyd", 4, 16, 4, factor_dtype="int8")}


def test_the_estimate_below_the_minimum_is_the_minimum(tiny: Architecture) -> None:
    known = knowing(tiny, decompose={"budget": "0.5bits"})
    assert set(known.allocation.values()) == {Choice("lloyd", 2, 32, 0, factor_dtype="int8")}


def test_files_are_the_layouts(tiny: Architecture) -> None:
    known = knowing(tiny)
    assert known.files("calibrate") == {"moments.safetensors": file_bytes(known.moments())}
    assert known.files("decompose") == {"model.safetensors": file_bytes(known.decomposed())}
    assert known.files("prune") == {"model.safetensors": file_bytes(known.pruned())}
    assert known.files("train") == {"adapter.safetensors": file_bytes(known.adapter())}
    assert known.files("compact") == {
        "model.safetensors": file_bytes(known.integers()),
        "adapter.safetensors": file_bytes(known.compact_adapter()),
    }
    assert known.files("recover") == {
        "adapter.safetensors": file_bytes(known.full_adapter()),
        "compact_adapter.safetensors": file_bytes(known.full_compact_adapter()),
    }
    assert known.files("export") == {
        "peft/adapter_model.safetensors": file_bytes(layouts.peft_adapter(tiny, 5)),
        "merged/model.safetensors": file_bytes(layouts.dense(tiny, "float32")),
        "small/model.safetensors": file_bytes(layouts.dense(known.small, "float32")),
        "compressed-tensors/model.safetensors": file_bytes(known.exported_integers("compressed-tensors")),
    }
    for stage in ("source", "score", "allocate", "evaluate"):
        assert known.files(stage) == {}


def test_covariances_are_planned_once_for_each_distinct_input(tiny: Architecture) -> None:
    moments = knowing(tiny).moments()
    sizes = {name: spec.shape for name, spec in moments.items() if name.endswith(".covariance")}
    assert len(sizes) == 4 * len(tiny.layers)
    for layer, role, name in tiny.linears():
        width = moments[f"{name}.input"].shape[0]
        assert sizes[f"model.layers.{layer}.{SITE[role]}.covariance"] == (width * (width + 1) // 2,)
    without = knowing(tiny, calibrate={"covariance": False}).moments()
    assert without == {name: spec for name, spec in moments.items() if name not in sizes}


def test_what_is_switched_off_is_not_planned(tiny: Architecture) -> None:
    known = knowing(tiny, compact={"enabled": False}, export={"peft": False, "merged": True, "small": False})
    assert known.files("compact") == {}
    assert set(known.files("recover")) == {"adapter.safetensors"}
    assert set(known.files("export")) == {"merged/model.safetensors"}
    assert [known.tensor_count(stage) for stage in ("compact", "recover", "export")] == [0, 28, len(tiny.tensors())]


def test_tensor_counts_are_those_of_the_layouts(tiny: Architecture) -> None:
    known = knowing(tiny)
    packed = len(known.exported_integers("compressed-tensors"))
    expected = {
        "calibrate": len(known.moments()),
        "decompose": len(known.decomposed()),
        "prune": len(known.pruned()),
        "train": len(known.adapter()),
        "compact": len(known.integers()) + len(known.compact_adapter()),
        "recover": len(known.full_adapter()) + len(known.full_compact_adapter()),
        "export": len(layouts.peft_adapter(tiny, 5)) + len(tiny.tensors()) + len(known.small.tensors()) + packed,
    }
    assert {stage: known.tensor_count(stage) for stage in CHAIN} == dict.fromkeys(CHAIN, 0) | expected


def test_a_warm_start_takes_over_the_rank(tiny: Architecture) -> None:
    assert knowing(tiny).compact_rank() == 5
    cold = knowing(tiny, compact={"warm_start": False})
    assert cold.compact_rank() == 3
    assert {spec.shape[0] for name, spec in cold.compact_adapter().items() if "lora_A" in name} == {3}


def test_the_small_architecture(tiny: Architecture) -> None:
    known = knowing(tiny)
    assert [(s.kv_heads, s.heads, s.ffn, s.hidden) for s in known.small.layers] == [(1, 2, 128, 64)] * 2
    guarded = knowing(tiny, prune={"protect_first": 1}, export={"small": False})
    assert [shape.kv_heads for shape in guarded.small.layers] == [2, 1]
    with pytest.raises(ConfigError, match=r"prune.ffn_ratio: ratio 0.999 would remove all"):
        check_shapes(tiny, configure(prune={"ffn_ratio": 0.999}))


def test_widths_that_scores_decide_are_a_guess_until_they_are_selected(tiny: Architecture) -> None:
    options = {"compact": {"enabled": False}, "export": {"small": False}}
    guess = knowing(tiny, prune={"ratio": 0.3, "widths": "allocated"}, **options).with_allocation(
        dict.fromkeys(knowing(tiny).allocation, Choice("nf", 2, 16, 4))
    )
    assert not guess.is_final
    assert guess.small == knowing(tiny, prune={"ratio": 0.3}, **options).small
    layers = [replace(tiny.layers[0], ffn=32), tiny.layers[1]]
    final = guess.with_kept(layers)
    assert final.is_final
    assert final.small.layers == tuple(layers)
    assert final.adapter()["model.layers.0.mlp.down_proj.lora_A.weight"].shape == (5, 32)
    assert final.files("prune") == {"model.safetensors": file_bytes(final.pruned())}
    assert final.files("train") != guess.files("train")
    assert knowing(tiny).with_allocation(guess.allocation).is_final


def test_every_width_that_may_be_chosen_suits_the_integer_groups(tiny: Architecture) -> None:
    given = {"compact": {"group_size": 32}, "export": {"small": False}}
    for align in (16, 32):
        prune = {"ratio": 0.25, "align": align}
        check_shapes(tiny, configure(prune=prune, **given))
        allocated = configure(prune={**prune, "widths": "allocated"}, **given)
        if align == 32:
            check_shapes(tiny, allocated)
        else:
            with pytest.raises(ConfigError, match="group_size 32 does not divide the 16 inputs of the pruned down"):
                check_shapes(tiny, allocated)
            check_shapes(tiny, configure(prune={**prune, "widths": "allocated", "ratio": 0.0}, **given))


def test_means_and_gates_are_planned_where_columns_are_pruned(tiny: Architecture) -> None:
    found = {name: spec.shape for name, spec in knowing(tiny, calibrate={"sequences": 7}).moments().items()}
    for layer, role, name in tiny.linears():
        width = shape_of(role, tiny.layers[layer])[1]
        assert found.get(f"{name}.mean") == ((width,) if role in ("o", "down") else None)
        assert found.get(f"{name}.gates") == ((7, width) if role in ("o", "down") else None)


def test_reads_count_each_file_once(tiny: Architecture) -> None:
    halves = dict.fromkeys(tiny.tensors(), "BF16")
    known = knowing(tiny, halves)
    weights = sum(math.prod(shape) for shape in tiny.tensors().values())
    assert known.base_bytes() == 2 * weights
    assert knowing(tiny).base_bytes() == 4 * weights
    size = {stage: sum(known.files(stage).values()) for stage in CHAIN}
    assert known.reads("score") == 2 * weights + size["calibrate"]
    assert known.reads("select") == size["decompose"] + size["calibrate"]
    assert known.reads("prune") == size["decompose"]
    assert known.reads("allocate") == 0
    assert known.reads("recover") == 2 * weights + sum(
        size[stage] for stage in ("calibrate", "prune", "train", "compact")
    )


def test_the_solved_allocation_replaces_the_estimate(tiny: Architecture) -> None:
    known = knowing(tiny)
    solved = dict.fromkeys(known.allocation, Choice("nf", 2, 16, 4))
    final = known.with_allocation(solved)
    assert (final.allocation_is_final, known.allocation_is_final) == (True, False)
    assert final.decomposed()["model.layers.0.self_attn.q_proj.lowrank_left"].shape == (64, 4)
    assert final.files("train") == known.files("train")
    assert final.files("prune") != known.files("prune")


def test_others_keep_the_dtype_of_the_checkpoint(tiny: Architecture) -> None:
    known = knowing(tiny, {"model.norm.weight": "BF16"})
    for layout in (known.decomposed(), known.pruned(), known.integers()):
        assert layout["model.norm.weight"].dtype == "BF16"
        assert layout["model.embed_tokens.weight"].dtype == "F32"
        assert layout["model.layers.0.self_attn.k_proj.bias"].dtype == "F32"


def test_adapters_have_the_shapes_of_their_matrices(tiny: Architecture) -> None:
    known = knowing(tiny)
    for architecture, layout in ((tiny, known.full_adapter()), (known.small, known.adapter())):
        for layer, role, name in architecture.linears():
            rows, columns = shape_of(role, architecture.layers[layer])
            assert layout[f"{name}.lora_A.weight"].shape == (5, columns)
            assert layout[f"{name}.lora_B.weight"].shape == (rows, 5)

"""The stages compose: what is sliced, trained small and put back is the same model (specified bit for bit in fp32).

Everything is read from the artifacts of a real run of a tiny model. Equalities are exact unless a tolerance is stated.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny import save_settings, save_texts, save_tiny_model
from torch import Tensor, nn

from prune.groups import PRUNED_AXIS, ROLES, shape_of
from prune.scatter import scatter_adapter
from qlora_pipe.allocation import read_allocation
from qlora_pipe.architectures import linear_name
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.hf.model import Model, dense_linear
from qlora_pipe.plan import know
from qlora_pipe.stages import compact
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import decomposed_model, integer_model, integer_modules, pruned_model, with_adapter
from qlora_pipe.stages.packing import packed_linear, read_packed
from qlora_pipe.stages.train import strength
from qlora_pipe.verify import verify_path
from quant import blockwise
from quant.codebook import normal_float
from quant.linear import PackedLinear
from quant.lowrank import dequantize_factors
from quant.scales import StoredScales, scales
from quant.storage import Choice

STEPS = ("train.learning_rate=0.02", "compact.learning_rate=0.02")
IDS = torch.arange(2 * 40).reshape(2, 40) * 11 % 256
GRIDS = ("decompose.grids=[lloyd, uint]", "decompose.superblocks=[4]", "decompose.budget=5.8bits")
VARIANTS = {
    "llama": ("llama", {}, ()),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}, ()),
    "qwen2": ("qwen2", {}, ()),
    "llama-grids": ("llama", {}, GRIDS),
}


@dataclass(frozen=True)
class Chain:
    """A run up to recovery, and the weights and logits of the compact model while it was still the trained one."""

    context: Context
    trained_weights: dict[str, Tensor]
    trained_logits: Tensor

    def packed(self, stage: str, layer: int, role: str) -> PackedLinear:
        """The linear map as a stage stored it."""
        known, name = self.context.known, linear_name(layer, role)
        return read_packed(self.context.reader(stage).read, name, known.packed_shape(stage, layer, role))

    def adapter(self, stage: str, layer: int, role: str) -> tuple[Tensor, Tensor]:
        reader, name = self.context.reader(stage, "adapter"), linear_name(layer, role)
        return reader.read(f"{name}.lora_A.weight"), reader.read(f"{name}.lora_B.weight")

    def kept(self, layer: int, role: str, full: Tensor) -> Tensor:
        """[I, J] of a full-size matrix."""
        indices = self.context.index_map.kept_indices(layer, role)
        return full[indices] if PRUNED_AXIS[role] == "rows" else full[:, indices]

    def outside(self, layer: int, role: str) -> Tensor:
        """Bool [out, in]: True off the kept block."""
        mask = torch.ones(shape_of(role, self.context.known.architecture.layers[layer]), dtype=torch.bool)
        indices = self.context.index_map.kept_indices(layer, role)
        if PRUNED_AXIS[role] == "rows":
            mask[indices] = False
        else:
            mask[:, indices] = False
        return mask

    def matrices(self) -> Iterator[tuple[int, str]]:
        return ((layer, role) for layer in range(2) for role in ROLES)


@pytest.fixture(scope="module", params=VARIANTS)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp(request.param)
    model_type, extra, changes = VARIANTS[request.param]
    save_tiny_model(folder / "model", model_type, **extra)
    save_texts(folder)
    # Steps large enough that every adapter is far from zero; wide enough to mix code widths.
    config = load(save_settings(folder), ("decompose.budget=4.5bits", *STEPS, *changes))
    seen: list[Model] = []
    fitted = compact.fit

    def fit(context: Context, model: Model, *args: object) -> object:
        seen.append(model)
        return fitted(context, model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "fit", fit)
        artifacts: dict[str, Artifact] = compile_model(config, Reporter(stream=io.StringIO()), until="recover")
    base = folder / "model"
    known = know(config, base)
    context = Context(config, known, base, artifacts, folder / "out", folder / "work", Reporter(stream=io.StringIO()))
    known = known.with_allocation(read_allocation(context.read_json("allocate", "allocation.json")))
    context = Context(config, known, base, artifacts, folder / "out", folder / "work", Reporter(stream=io.StringIO()))
    weights = {name: module.dequantized() for name, module in integer_modules(seen[0]).items()}
    return Chain(context, weights, logits(seen[0].eval()))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def product(left: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """start + left @ right, one rank after the other: the order of summation does not depend on the shapes."""
    total = start.clone()
    for rank in range(left.shape[1]):
        total += left[:, rank, None] * right[rank]
    return total


def with_factors(module: PackedLinear, left: Tensor, right: Tensor) -> PackedLinear:
    """The same codes with another low-rank part, in fp32."""
    shape = module.shape
    shape = replace(shape, choice=replace(shape.choice, rank=left.shape[1], factor_dtype="float32"))
    kept = {name: tensor for name, tensor in module.state_dict().items() if name != "lowrank_scale"}
    return packed_linear(shape, {**kept, "lowrank_left": left, "lowrank_right": right})


def factors_of(module: PackedLinear) -> tuple[Tensor, Tensor]:
    """fp32 factors of the low-rank part, whatever they are stored in."""
    buffers = dict(module.named_buffers())
    return dequantize_factors(buffers["lowrank_left"], buffers["lowrank_right"], buffers.get("lowrank_scale"))


def test_slicing_commutes_with_the_decomposition(chain: Chain) -> None:
    """F1: (Q + L1 L2)[I, J] = Q[I, J] + L1[I] L2[:, J]."""
    formats = set()
    for layer, role in chain.matrices():
        full, small = chain.packed("decompose", layer, role), chain.packed("prune", layer, role)
        assert small.codes.shape[0] < full.codes.shape[0]
        for lowrank in (False, True):
            expected = chain.kept(layer, role, full.dequantized(lowrank))
            assert torch.equal(small.dequantized(lowrank), expected), (layer, role)
        if full.bias is not None:
            assert small.bias is not None
            expected = chain.kept(layer, role, full.bias) if PRUNED_AXIS[role] == "rows" else full.bias
            assert torch.equal(small.bias, expected), (layer, role)
        formats.add((full.shape.choice.grid, full.shape.choice.bits))
    assert len(formats) > 1, "the allocation mixes code widths or grids"


def test_the_scattered_adapter_changes_the_kept_block_alone(chain: Chain) -> None:
    """F2: on the kept block the full matrix is the small one with its adapter, elsewhere it is unchanged."""
    scale = strength(chain.context)
    for layer, role in chain.matrices():
        full, small = (chain.packed(stage, layer, role).dequantized() for stage in ("decompose", "prune"))
        full_a, full_b = chain.adapter("recover", layer, role)
        small_a, small_b = chain.adapter("train", layer, role)
        adapted = product(scale * full_b, full_a, full)
        expected = product(scale * small_b, small_a, small)
        assert torch.equal(chain.kept(layer, role, adapted), expected), (layer, role)
        assert not torch.equal(expected, small)
        outside = chain.outside(layer, role)
        assert torch.equal(adapted[outside], full[outside]), (layer, role)


def test_two_adapters_are_one_of_both_ranks(chain: Chain) -> None:
    """F3: B = [L1, s R(T_B)], A = [L2; R(T_A)] with scaling 1. Forward passes agree to 1e-5 of the largest output."""
    scale = strength(chain.context)
    for layer, role in chain.matrices():
        joined = {}
        for stage, trained in (("decompose", "recover"), ("prune", "train")):
            module = chain.packed(stage, layer, role)
            lora_a, lora_b = chain.adapter(trained, layer, role)
            first, second = factors_of(module)
            left, right = torch.cat([first, scale * lora_b], dim=1), torch.cat([second, lora_a])
            joined[stage] = with_factors(module, left, right)
            x = torch.randn(5, module.shape.in_features, generator=torch.Generator().manual_seed(layer))
            module.attach_adapter(lora_a.shape[0], scale * lora_a.shape[0], torch.Generator())
            with torch.no_grad():
                module.task_a.copy_(lora_a)
                module.task_b.copy_(lora_b)
                apart, together = module(x), joined[stage](x)
            torch.testing.assert_close(together, apart, rtol=0, atol=1e-5 * apart.abs().max().item())
        expected = chain.kept(layer, role, joined["decompose"].dequantized())
        assert torch.equal(joined["prune"].dequantized(), expected), (layer, role)


def test_where_the_removed_structure_does_nothing_recovery_is_exact(chain: Chain) -> None:
    """Zero columns of o and down for removed groups: small(T) = full(R(T)). Tolerance 1e-5 of the largest logit."""
    context = chain.context
    full_adapter = with_adapter(context.reader("recover", "adapter").read, strength(context), context.dtype)
    small_adapter = with_adapter(context.reader("train", "adapter").read, strength(context), context.dtype)

    def neutral(layer: int, role: str, name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        weight = module.weight.detach().clone()
        if role in ("o", "down"):
            weight[chain.outside(layer, role)] = 0
        return full_adapter(layer, role, name, dense_linear(weight, module.bias))

    small = logits(pruned_model(context, small_adapter))
    close = 1e-5 * small.abs().max().item()
    torch.testing.assert_close(logits(decomposed_model(context, neutral)), small, rtol=0, atol=close)
    assert (logits(pruned_model(context)) - small).abs().max() > 1000 * close, "the adapter does something"
    kept_whole = logits(decomposed_model(context, full_adapter))
    assert (kept_whole - small).abs().max() > 1000 * close, "so does the removed structure"


def drifted(chain: Chain, layer: int, role: str) -> tuple[PackedLinear, PackedLinear, Tensor, Tensor]:
    """Full and small map, and the low-rank factors of the small one as training in place would move them."""
    full, small = (chain.packed(stage, layer, role) for stage in ("decompose", "prune"))
    full, small = (with_factors(module, *factors_of(module)) for module in (full, small))
    generator = torch.Generator().manual_seed(7)
    left, right = factors_of(small)
    noise = [0.05 * torch.randn(factor.shape, generator=generator) * factor.std() for factor in (left, right)]
    return full, small, left + noise[0], right + noise[1]


@pytest.mark.parametrize("role", ["q", "up", "o", "down"])
def test_factors_trained_in_place_cannot_be_put_back_at_their_rank(chain: Chain, role: str) -> None:
    """N1 loses L1 L2 where it was not trained; N2 keeps the rows but their shared factor has moved."""
    full, small, left, right = drifted(chain, 0, role)
    kept = chain.context.index_map.kept_indices(0, role)
    scattered_right, scattered_left = scatter_adapter(
        right, left, role, kept, (full.shape.out_features, full.shape.in_features)
    )
    filled_left, filled_right = (factor.clone() for factor in factors_of(full))
    if PRUNED_AXIS[role] == "rows":
        filled_left[kept], filled_right = left, right
    else:
        filled_left, filled_right[:, kept] = left, right
    truth, outside = full.dequantized(), chain.outside(0, role)
    trained = with_factors(small, left, right).dequantized()
    for name, factors in {"N1": (scattered_left, scattered_right), "N2": (filled_left, filled_right)}.items():
        found = with_factors(full, *factors).dequantized()
        assert torch.equal(chain.kept(0, role, found), trained), f"{name} is right on the kept block"
        assert not torch.equal(found[outside], truth[outside]), f"{name} is wrong elsewhere"
    bare = with_factors(full, scattered_left, scattered_right).dequantized()
    assert torch.equal(bare[outside], full.dequantized(include_lowrank=False)[outside]), "N1 leaves bare codes"
    moved = (with_factors(full, filled_left, filled_right).dequantized() - truth)[outside].norm()
    size = (truth - full.dequantized(include_lowrank=False))[outside].norm()
    assert 0.01 * size < moved < 0.2 * size, "N2 is wrong by about the drift of 5 %"


@pytest.mark.parametrize("role", ["q", "up", "o", "down"])
def test_factors_trained_in_place_go_back_exactly_at_twice_the_rank(chain: Chain, role: str) -> None:
    full, small, left, right = drifted(chain, 0, role)
    kept = chain.context.index_map.kept_indices(0, role)
    other_left, other_right = (factor.clone() for factor in factors_of(full))
    if PRUNED_AXIS[role] == "rows":
        other_left[kept] = 0
    else:
        other_right[:, kept] = 0
    back_right, back_left = scatter_adapter(right, left, role, kept, (full.shape.out_features, full.shape.in_features))
    double = with_factors(full, torch.cat([other_left, back_left], dim=1), torch.cat([other_right, back_right]))
    found, outside = double.dequantized(), chain.outside(0, role)
    assert double.shape.choice.rank == 2 * full.shape.choice.rank
    assert torch.equal(chain.kept(0, role, found), with_factors(small, left, right).dequantized())
    assert torch.equal(found[outside], full.dequantized()[outside])


def test_codes_of_down_slice_with_blocks_along_the_output_alone() -> None:
    """Slice the codes, then dequantise = dequantise, then slice; blocks along the input straddle the cut."""
    fmt = Choice("nf", 3, 16, 0)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([n for n in range(96) if n % 3])

    def rebuild(codes: Tensor, scale: Tensor) -> Tensor:
        return blockwise.dequantize(codes, scale, normal_float(fmt.bits))

    along_output = blockwise.quantize(weight.T.contiguous(), fmt)
    stored = along_output.scales
    scale = scales(stored, fmt)
    whole = rebuild(along_output.codes, scale)
    sliced_scale = scales(StoredScales(stored.values[kept], stored.maximum[kept], stored.offset), fmt)
    assert torch.equal(sliced_scale, scale[kept])
    assert torch.equal(rebuild(along_output.codes[kept], sliced_scale).T, whole.T[:, kept])

    along_input = blockwise.quantize(weight, fmt)
    scale = scales(along_input.scales, fmt)
    expected = rebuild(along_input.codes, scale)[:, kept]
    naive = rebuild(along_input.codes[:, kept].contiguous(), scale[:, : len(kept) // fmt.block_size].contiguous())
    assert not torch.equal(naive, expected)
    block_of_column = kept // fmt.block_size
    levels = rebuild(along_input.codes, torch.ones_like(scale))[:, kept]
    assert torch.equal(levels * scale[:, block_of_column], expected), "exact again with the index vector"


def test_without_the_task_the_full_model_is_the_decomposed_one(chain: Chain) -> None:
    context = chain.context
    read = context.reader("recover", "adapter").read
    plain = logits(decomposed_model(context))
    assert torch.equal(logits(decomposed_model(context, with_adapter(read, 0.0, context.dtype))), plain)

    def erased(name: str) -> Tensor:
        tensor = read(name)
        return torch.zeros_like(tensor) if "lora_B" in name else tensor

    assert torch.equal(logits(decomposed_model(context, with_adapter(erased, 1.0, context.dtype))), plain)
    assert not torch.equal(logits(decomposed_model(context, with_adapter(read, 1.0, context.dtype))), plain)


def test_stored_integers_give_the_logits_of_training(chain: Chain) -> None:
    """At these widths the matrix products sum in one order too; at others only the weights are the same bits."""
    reloaded = integer_model(chain.context, chain.context.reader("compact"))
    assert len(chain.trained_weights) == 2 * len(ROLES)
    for name, weight in chain.trained_weights.items():
        assert torch.equal(reloaded.get_parameter(f"{name}.weight"), weight), name
    assert torch.equal(logits(reloaded), chain.trained_logits)


def test_every_artifact_verifies(chain: Chain) -> None:
    stages = {line.split()[0] for line in verify_path(Path(chain.context.config.run))}
    assert {"decompose", "prune", "recover"} <= stages


def test_the_variant_of_all_grids_takes_several(chain: Chain) -> None:
    """Both kinds of scales are there, and what pruning makes of those whose superblocks span rows."""
    if "uint" not in chain.context.config.decompose.grids:
        pytest.skip("one grid only")
    assert {choice.grid for choice in chain.context.known.allocation.values()} == {"lloyd", "uint"}
    for layer, role in chain.matrices():
        full, small = (dict(chain.packed(stage, layer, role).named_buffers()) for stage in ("decompose", "prune"))
        assert "lowrank_scale" in full
        assert "scale" in small
        assert ("scale_max" in full) == ("zero_codes" not in full)

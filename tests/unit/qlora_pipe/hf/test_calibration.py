"""Both sweeps against inputs and output gradients that autograd captured in the whole stock model.

Tolerances: 1e-4 relative for mean squares, 1e-4 of the largest entry for covariances; a layer that runs alone in
fp32 differs from the whole model in the last bits only, which 8 layers of backward multiply.
"""

import io
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipeline.test_chain import FAMILIES
from tiny import save_tiny_model
from tiny_models import LiveWeights, TinyFolder, byte_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import qlora_pipe.hf.calibration
from qlora_pipe.architectures import SITE, SITES
from qlora_pipe.errors import StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf.calibration import Gradients, batches_of, covariance_sweep, gradient_sweep
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.model import dense_linear
from qlora_pipe.hf.sequences import Row
from quant.moments import Covariance

# Longer than the sliding windows of the tiny models (32); two rows of one length share a batch.
TEXTS = ["a row of text", "another, rather longer row of calibration text that leaves the window", "some more text"]
ROWS = byte_rows([*TEXTS, "last of a kind"], ignored=5)


def captured(model: PreTrainedModel, row: Row, names: list[str]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Input of each linear map, gradients of its output and input, under the stock summed loss of one row."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0], output)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: keep(name, x, y)) for name in names
    ]
    loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss * row.scored
    for handle in handles:
        handle.remove()
    outputs = torch.autograd.grad(loss, [output for _, output in seen.values()], retain_graph=True)
    inputs = torch.autograd.grad(loss, [x for x, _ in seen.values()])
    return {
        name: (x[0].detach(), output[0], grad[0])
        for (name, (x, _)), output, grad in zip(seen.items(), outputs, inputs, strict=True)
    }


def sweep_gradients(stream: LayerStream, rows: list[Row], folder: Path) -> Gradients:
    return gradient_sweep(stream, batches_of(rows, "cpu"), folder, Reporter(stream=io.StringIO()))


def sweep_covariances(
    stream: LayerStream, rows: list[Row], gradients: Gradients | None, folder: Path
) -> list[dict[str, Covariance]]:
    found: dict[int, dict[str, Covariance]] = {}
    norms, quiet = gradients and gradients.norms, Reporter(stream=io.StringIO())
    covariance_sweep(stream, batches_of(rows, "cpu"), norms, found.__setitem__, folder, quiet)
    assert all(tuple(covariances) == SITES for covariances in found.values())
    return [found[layer] for layer in range(len(stream))]


@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_sweeps_find_what_autograd_sees_in_the_whole_model(
    family: str, grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if grouped:
        monkeypatch.setattr(qlora_pipe.hf.calibration, "BOUNDARY_BYTES", 1)
    folder = save_tiny_model(tmp_path, family.partition("-")[0], num_hidden_layers=8, **FAMILIES[family])
    tiny = TinyFolder(folder)
    stream = tiny.stream()
    found = sweep_gradients(stream, ROWS, tmp_path)
    weighted, plain = (sweep_covariances(stream, ROWS, norms, tmp_path) for norms in (found, None))

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    names = {name: (layer, role) for layer, role, name in tiny.architecture.linears()}
    rows = [captured(stock, row, list(names)) for row in ROWS]
    tokens = sum(len(row.input_ids) for row in ROWS)
    assert list(found.moments) == list(names)
    norms: dict[tuple[int, str], Tensor] = {}
    for name, (layer, role) in names.items():
        inputs, gradients = (torch.cat([row[name][side] for row in rows]).double() for side in (0, 1))
        assert found.moments[name].input_tokens == found.moments[name].grad_tokens == tokens
        columns, output_rows = (part.square().mean(dim=0).sqrt().float() for part in (inputs, gradients))
        torch.testing.assert_close(found.moments[name].column_weight(), columns, rtol=1e-4, atol=1e-7)
        floor = 1e-6 * output_rows.max().item()
        torch.testing.assert_close(found.moments[name].row_weight(), output_rows, rtol=1e-4, atol=floor)
        if role in ("o", "down"):
            assert found.readers[name].input_tokens == tokens
            torch.testing.assert_close(found.readers[name].mean(), inputs.mean(dim=0).float(), rtol=1e-4, atol=1e-6)
            # Batches are in the order of length.
            longest = sorted(rows, key=lambda row: -len(row[name][0]))
            expected = torch.stack([(row[name][0].double() * row[name][2].double()).sum(dim=0) for row in longest])
            floor = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(found.readers[name].gates, expected, rtol=1e-4, atol=floor)
        site = (layer, SITE[role])
        norms[site] = norms.get(site, torch.zeros(tokens)) + gradients.square().sum(dim=1)
    for name, (layer, role) in names.items():
        x, weight = torch.cat([row[name][0] for row in rows]).double(), norms[layer, SITE[role]]
        for which, weights in ((weighted, weight / weight.mean()), (plain, torch.ones(tokens).double())):
            covariance = which[layer][SITE[role]]
            expected = (x.T * weights) @ x / tokens
            largest = expected.abs().max().item()
            torch.testing.assert_close(covariance.mean(), expected, rtol=0, atol=1e-4 * largest)
            heaviest = (weights * x.square().sum(dim=1)).max().item() / tokens
            assert covariance.top_share() == pytest.approx(heaviest / expected.trace().item(), rel=1e-4)


def test_rows_of_one_length_go_together_up_to_a_number_of_tokens() -> None:
    rows = byte_rows(["x" * size for size in (10, 20, 10, 40, 10, 10)])
    found = batches_of(rows, "cpu", 30)
    assert [tuple(batch.inputs["input_ids"].shape) for batch in found] == [(1, 40), (1, 20), (3, 10), (1, 10)]
    assert [(batch.tokens.start, batch.tokens.stop) for batch in found] == [(0, 40), (40, 60), (60, 90), (90, 100)]
    assert [(batch.rows.start, batch.rows.stop) for batch in found] == [(0, 1), (1, 2), (2, 5), (5, 6)]
    assert all(batch.inputs["attention_mask"].all() for batch in found)


@pytest.mark.parametrize("layers", [2, 9])
def test_one_layer_lives_at_a_time_however_deep_the_model(layers: int, tmp_path: Path) -> None:
    live = LiveWeights(TinyFolder(save_tiny_model(tmp_path, num_hidden_layers=layers)))
    stream = live.stream()
    found = sweep_gradients(stream, ROWS, tmp_path)
    assert set(live.loads.values()) == {2}
    sweep_covariances(stream, ROWS, found, tmp_path)
    assert live.most == 1
    assert live.now() == set()
    assert set(live.loads.values()) == {3}


@pytest.mark.parametrize(("tokens", "loads"), [(1, 6), (40, 6), (41, 4), (10_000, 2)])
def test_layers_are_loaded_once_more_for_every_group_of_batches(
    tokens: int, loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveWeights(TinyFolder(save_tiny_model(tmp_path)))
    stream = live.stream()
    assert [batch.tokens.stop for batch in batches_of(ROWS, "cpu")] == [69, 97, 110]
    monkeypatch.setattr(qlora_pipe.hf.calibration, "BOUNDARY_BYTES", tokens * 4 * 64 * 3)
    sweep_gradients(stream, ROWS, tmp_path)
    assert set(live.loads.values()) == {loads}


def test_covariances_of_one_layer_live_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Covariance] = weakref.WeakSet()
    counts = []

    class Counted(Covariance):
        def __init__(self, features: int, *, device: str) -> None:
            super().__init__(features, device=device)
            alive.add(self)
            counts.append(len(alive))

    monkeypatch.setattr(qlora_pipe.hf.calibration, "Covariance", Counted)
    stream = TinyFolder(save_tiny_model(tmp_path, num_hidden_layers=5)).stream()
    quiet = Reporter(stream=io.StringIO())
    covariance_sweep(stream, batches_of(ROWS, "cpu"), None, lambda layer, found: None, tmp_path, quiet)
    assert counts == [1, 2, 3, 4] * 5


def changed(tiny: TinyFolder, name: str, change: Callable[[Tensor], Tensor]) -> LayerStream:
    """The model with one matrix changed."""

    def linear(layer: int, role: str, module: str) -> nn.Module:
        weight, bias = tiny.weight(role, module)
        return dense_linear(change(weight) if module == name else weight, bias)

    return LayerStream(tiny.config, tiny.architecture, linear, tiny.reader.read_float, device="cpu")


def test_overflow_names_the_first_layer_and_map_that_see_it(tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path, num_hidden_layers=4))
    stream = changed(tiny, "model.layers.2.mlp.up_proj", lambda weight: weight * 3e38)
    for sweep in (sweep_gradients, lambda *given: sweep_covariances(*given[:2], None, given[2])):
        with pytest.raises(StageError, match=r"^model.layers.2.mlp.down_proj: inputs .*NaN or infinity"):
            sweep(stream, ROWS, tmp_path)
    stream = changed(tiny, "model.layers.3.mlp.down_proj", lambda weight: weight * 3e38)
    with pytest.raises(StageError, match="loss of the model on the calibration text is"):
        sweep_gradients(stream, ROWS, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors", ".jinja")]


def test_overflow_of_a_gradient_names_its_map(tmp_path: Path) -> None:
    """The loss is finite, for the inputs of the matrix are zero; its gradient is not."""
    tiny = TinyFolder(save_tiny_model(tmp_path))
    huge = changed(tiny, "model.layers.1.mlp.down_proj", lambda weight: torch.full_like(weight, 1e38))

    def linear(layer: int, role: str, module: str) -> nn.Module:
        made = huge._linear(layer, role, module)
        if module == "model.layers.1.mlp.up_proj":
            made.weight.data.zero_()
        return made

    stream = LayerStream(tiny.config, tiny.architecture, linear, tiny.reader.read_float, device="cpu")
    with pytest.raises(StageError, match=r"^model.layers.1.mlp.up_proj: gradients, or their squares in fp32, hold"):
        sweep_gradients(stream, ROWS, tmp_path)


def test_one_scored_token_and_dead_inputs_are_defined(tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path))
    dead = [5, 17]

    def kill(weight: Tensor) -> Tensor:
        weight[dead] = 0
        return weight

    stream, rows = changed(tiny, "model.layers.0.mlp.up_proj", kill), byte_rows(["ab"])
    found = sweep_gradients(stream, rows, tmp_path)
    assert found.moments["model.layers.0.mlp.up_proj"].grad_tokens == 2
    for layer in sweep_covariances(stream, rows, found, tmp_path):
        for covariance in layer.values():
            mean = covariance.mean()
            assert torch.isfinite(mean).all()
            assert torch.linalg.matrix_rank(mean, rtol=1e-5) <= 2
    first = sweep_covariances(stream, rows, found, tmp_path)[0]["ffn_hidden"].mean()
    assert (first.diagonal() == 0).nonzero().flatten().tolist() == dead
    assert not first[dead].any()


def test_tokens_weigh_alike_where_no_gradient_arrives(tmp_path: Path) -> None:
    """A block whose output maps are zero, as block expansion adds them, has no say in the loss."""
    stream = changed(TinyFolder(save_tiny_model(tmp_path)), "model.layers.1.self_attn.o_proj", torch.zeros_like)
    found = sweep_gradients(stream, ROWS, tmp_path)
    assert not found.norms[1, "attention_input"].any()
    weighted, plain = (sweep_covariances(stream, ROWS, norms, tmp_path)[1] for norms in (found, None))
    assert torch.equal(weighted["attention_input"].mean(), plain["attention_input"].mean())
    assert not torch.equal(weighted["attention_output"].mean(), plain["attention_output"].mean())


def test_the_second_sweep_may_see_another_prefix(tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path))
    found = sweep_gradients(tiny.stream(), ROWS, tmp_path)
    other = changed(tiny, "model.layers.0.self_attn.v_proj", lambda weight: weight.round(decimals=1))
    here, there = (sweep_covariances(stream, ROWS, found, tmp_path) for stream in (tiny.stream(), other))
    assert torch.equal(here[0]["attention_input"].mean(), there[0]["attention_input"].mean())
    assert not torch.equal(here[0]["attention_output"].mean(), there[0]["attention_output"].mean())

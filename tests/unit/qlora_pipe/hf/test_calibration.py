"""Moments against inputs and output gradients that autograd captured in the stock model. Tolerance 1e-4 relative."""

import io
from pathlib import Path

import pytest
import torch
from pipeline.test_chain import FAMILIES
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_pipe.events import Reporter
from qlora_pipe.hf.calibration import collect
from qlora_pipe.hf.tokens import Row

ROWS = byte_rows(["a row of text", "another, rather longer row of calibration text"], ignored=5)


def captured(model: PreTrainedModel, row: Row, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and gradient of the output of each linear map under the stock summed loss of one row."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = (inputs[0].detach(), output)

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: keep(name, x, y)) for name in names
    ]
    loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss * row.scored
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    return {name: (x[0], grad[0]) for (name, (x, _)), grad in zip(seen.items(), gradients, strict=True)}


@pytest.mark.parametrize("family", ["llama-bias", "gemma2", "qwen3"])
def test_moments_are_the_mean_squares_of_what_autograd_sees(family: str, tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path, family.partition("-")[0], **FAMILIES[family]))
    names = [name for _, _, name in tiny.architecture.linears()]
    model = tiny.dense()
    found = collect(model, ROWS, names, Reporter(stream=io.StringIO()))

    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rows = [captured(stock, row, names) for row in ROWS]
    tokens = sum(len(row.input_ids) for row in ROWS)
    assert set(found) == set(names)
    for name in names:
        inputs, gradients = (torch.cat([row[name][side] for row in rows]).double() for side in (0, 1))
        assert found[name].input_tokens == found[name].grad_tokens == tokens
        columns, output_rows = (part.square().mean(dim=0).sqrt().float() for part in (inputs, gradients))
        torch.testing.assert_close(found[name].column_weight(), columns, rtol=1e-4, atol=1e-7)
        floor = 1e-6 * output_rows.max().item()
        torch.testing.assert_close(found[name].row_weight(), output_rows, rtol=1e-4, atol=floor)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path))
    model = tiny.dense()
    collect(model, ROWS, ["model.layers.0.mlp.up_proj"], Reporter(stream=io.StringIO()))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    hooks = [name for name, module in model.named_modules() if has_hooks(module)]
    assert hooks == []


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)

"""Our loss against that of stock transformers.

Tolerances: 1e-6 relative for losses, 1e-5 of the largest entry for gradients.
"""

import math
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_pipe.errors import StageError
from qlora_pipe.footprint import HEAD_ROWS
from qlora_pipe.hf.loss import Score, score, summed_loss
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row, collate

# Small enough to bend the logits of a random model.
GEMMA2 = {"query_pre_attn_scalar": 16, "sliding_window": 32, "final_logit_softcapping": 2.0}
ROWS = byte_rows(["a short row of text", "x" * 180 + "and a much longer one", "the third", "y z " * 40], ignored=3)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, PreTrainedModel]:
    """Ours and the stock one, of the same weights."""
    folder = save_tiny_model(
        tmp_path_factory.mktemp("model"), request.param, **(GEMMA2 if request.param == "gemma2" else {})
    )
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return TinyFolder(folder).dense(), stock


def stock_loss(model: PreTrainedModel, row: Row) -> Tensor:
    """Summed loss as transformers computes it, row by row and without padding."""
    batch = collate([row])
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return loss * int((batch["labels"][:, 1:] >= 0).sum())


def test_summed_loss_is_the_stock_loss(models: tuple[Model, PreTrainedModel]) -> None:
    ours, stock = models
    with torch.no_grad():
        for row in ROWS:
            expected = stock_loss(stock, row).item()
            assert summed_loss(ours, collate([row])).item() == pytest.approx(expected, rel=1e-6)


def test_padding_and_batching_change_nothing(models: tuple[Model, PreTrainedModel]) -> None:
    ours, stock = models
    assert sum(row.scored for row in ROWS) > HEAD_ROWS, "more than one part of the head"
    with torch.no_grad():
        expected = math.fsum(stock_loss(stock, row).item() for row in ROWS)
        assert summed_loss(ours, collate(ROWS)).item() == pytest.approx(expected, rel=1e-6)
    for batch_tokens in (1, 250, 10**6):
        found = score(ours, ROWS, batch_tokens=batch_tokens)
        assert found.nll == pytest.approx(expected, rel=1e-6)
        assert found.tokens == sum(row.scored for row in ROWS)


def test_gradient_is_the_stock_gradient(models: tuple[Model, PreTrainedModel]) -> None:
    ours, stock = models
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    found, expected = ([model.get_parameter(name) for name in names] for model in models)
    for parameter in found:
        parameter.requires_grad_()
    gradients = torch.autograd.grad(summed_loss(ours, collate(ROWS)), found)
    for parameter in found:
        parameter.requires_grad_(False)
    losses = torch.stack([stock_loss(stock, row) for row in ROWS])
    for name, ours_grad, stock_grad in zip(names, gradients, torch.autograd.grad(losses.sum(), expected), strict=True):
        assert stock_grad.abs().max() > 1e-3, name
        torch.testing.assert_close(ours_grad, stock_grad, rtol=0, atol=1e-5 * stock_grad.abs().max().item())


def test_no_keys_and_values_are_cached(models: tuple[Model, PreTrainedModel]) -> None:
    kept = []
    handle = models[0].model.register_forward_hook(lambda module, inputs, output: kept.append(output.past_key_values))
    score(models[0], ROWS[:1])
    handle.remove()
    assert kept == [None]


def test_a_broken_model_is_an_error(tmp_path: Path) -> None:
    model = TinyFolder(save_tiny_model(tmp_path)).dense()
    model.get_parameter("model.norm.weight").fill_(math.nan)
    with pytest.raises(StageError, match="the loss over 16 held-out tokens is nan"):
        score(model, ROWS[:1])


def test_score_gives_loss_and_perplexity() -> None:
    found = Score(nll=math.log(8) * 5, tokens=5)
    assert found.loss == pytest.approx(math.log(8))
    assert found.perplexity == pytest.approx(8)
    assert Score(nll=710.0, tokens=1).perplexity == math.inf

"""The one definition of the language-model loss, for training and for perplexity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora_pipe.errors import StageError
from qlora_pipe.hf.sequences import IGNORED, Row, collate
from qlora_pipe.memory import EVALUATION_TOKENS, HEAD_ROWS


@dataclass(frozen=True)
class Score:
    """Summed negative log-likelihood (nats) over scored tokens."""

    nll: float
    tokens: int

    @property
    def loss(self) -> float:
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinity when that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def summed_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Summed next-token cross entropy over the positions whose label is not IGNORED, a scalar.

    The head sees scored positions only, 256 at a time, recomputed in the backward pass. Peak bytes beyond the hidden
    states: about 4 x 256 x vocabulary floats.
    """
    targets = batch["labels"][:, 1:]
    states, wanted = predicting_states(model, batch), targets[targets != IGNORED]
    head = model.get_output_embeddings()
    cap = cap_of(model)
    total = states.new_zeros(())
    for start in range(0, len(wanted), HEAD_ROWS):
        part = (head, cap, states[start : start + HEAD_ROWS], wanted[start : start + HEAD_ROWS])
        total = total + (
            checkpoint(_head_loss, *part, use_reentrant=False) if torch.is_grad_enabled() else _head_loss(*part)
        )
    return total


def summed_divergence(teacher: PreTrainedModel, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Summed Kullback-Leibler divergence of the model's next-token predictions from the teacher's, over the positions
    whose label is not IGNORED, a scalar; differentiable in the model. Peak bytes: as `summed_loss`, twice."""
    with torch.no_grad():
        wanted = predicting_states(teacher, batch)
    return divergence(teacher, model, wanted, predicting_states(model, batch))


def divergence(teacher: PreTrainedModel, model: PreTrainedModel, wanted: Tensor, states: Tensor) -> Tensor:
    """The same from their final hidden states [positions, hidden], `wanted` the teacher's, that `predicting_states`
    finds."""
    total = states.new_zeros(())
    for start in range(0, len(states), HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        inputs = (model, teacher, states[part], wanted[part])
        total = total + (
            checkpoint(_head_divergence, *inputs, use_reentrant=False)
            if torch.is_grad_enabled()
            else _head_divergence(*inputs)
        )
    return total


def score(model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int = EVALUATION_TOKENS) -> Score:
    """Score of a model on rows, in batches of like length with about `batch_tokens` tokens; StageError on a NaN."""
    device = next(model.parameters()).device
    ordered = sorted(rows, key=lambda row: len(row.input_ids), reverse=True)
    nll, tokens, start = 0.0, 0, 0
    with torch.no_grad():
        while start < len(ordered):
            size = max(1, batch_tokens // len(ordered[start].input_ids))
            chosen = ordered[start : start + size]
            batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
            nll += summed_loss(model, batch).double().item()
            tokens += sum(row.scored for row in chosen)
            start += size
    if not math.isfinite(nll):
        raise StageError(f"the loss over {tokens} held-out tokens is {nll}: the weights of this model are broken")
    return Score(nll, tokens)


def _head_loss(head: nn.Module, cap: float | None, states: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(head, cap, states), wanted, reduction="sum")


def _head_divergence(model: PreTrainedModel, teacher: PreTrainedModel, states: Tensor, wanted: Tensor) -> Tensor:
    cap = cap_of(model)
    found = logits_of(model.get_output_embeddings(), cap, states).log_softmax(dim=-1)
    with torch.no_grad():
        target = logits_of(teacher.get_output_embeddings(), cap, wanted).log_softmax(dim=-1)
    return functional.kl_div(found, target, reduction="sum", log_target=True)


def logits_of(head: nn.Module, cap: float | None, states: Tensor) -> Tensor:
    """fp32 logits of final hidden states, capped as Gemma 2 does."""
    logits: Tensor = head(states).float()
    return cap * torch.tanh(logits / cap) if cap else logits


def cap_of(model: PreTrainedModel) -> float | None:
    """The bound of its logits, if it has one."""
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap


def predicting_states(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Final hidden states [positions, hidden] at the positions before those whose label is not IGNORED."""
    where = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
    hidden: Tensor = model.model(input_ids=batch["input_ids"], use_cache=False, **where).last_hidden_state
    return hidden[:, :-1][batch["labels"][:, 1:] != IGNORED]

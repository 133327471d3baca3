"""The one definition of the language-model loss, for training and for perplexity."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora_pipe.errors import StageError
from qlora_pipe.footprint import HEAD_ROWS
from qlora_pipe.hf.sequences import IGNORED, Row, attending, collate
from qlora_pipe.memory import EVALUATION_TOKENS


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
    return over_head_rows(model, _head_loss, predicting_states(model, batch), scored_tokens(batch))


def over_head_rows(model: PreTrainedModel, function: Callable[..., Tensor], states: Tensor, *beside: Tensor) -> Tensor:
    """The sum of `function(logits, *beside)`, a scalar, over final hidden states [positions, hidden] and what is
    `beside` each position: HEAD_ROWS positions at a time, recomputed in the backward pass."""
    head, cap = model.get_output_embeddings(), cap_of(model)

    def of(states: Tensor, *beside: Tensor) -> Tensor:
        return function(logits_of(head, cap, states), *beside)

    total = states.new_zeros(())
    for part in zip(*(tensor.split(HEAD_ROWS) for tensor in (states, *beside)), strict=True):
        total = total + (checkpoint(of, *part, use_reentrant=False) if torch.is_grad_enabled() else of(*part))
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
    return over_head_rows(model, partial(_head_divergence, teacher), states, wanted)


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


def _head_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    return functional.cross_entropy(logits, wanted, reduction="sum")


def _head_divergence(teacher: PreTrainedModel, logits: Tensor, wanted: Tensor) -> Tensor:
    found = logits.log_softmax(dim=-1)
    with torch.no_grad():
        target = logits_of(teacher.get_output_embeddings(), cap_of(teacher), wanted).log_softmax(dim=-1)
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
    hidden: Tensor = model.model(input_ids=batch["input_ids"], use_cache=False, **attending(batch)).last_hidden_state
    return hidden[:, :-1][batch["labels"][:, 1:] != IGNORED]


def scored_tokens(batch: dict[str, Tensor]) -> Tensor:
    """What follows at these positions: token ids [positions]."""
    following = batch["labels"][:, 1:]
    return following[following != IGNORED]

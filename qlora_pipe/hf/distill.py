"""Distillation from a teacher on disk: its most likely next tokens, and how far a model is from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qlora_pipe.artifacts.scratch import Scratch
from qlora_pipe.events import Reporter
from qlora_pipe.hf.calibration import Arguments, batches_of
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.loss import cap_of, logits_of, predicting_states
from qlora_pipe.hf.sequences import IGNORED, Row
from qlora_pipe.memory import HEAD_ROWS

# A model's probability of all other tokens is at least this: its logarithm stays finite.
_LEAST = 1e-6


Tokens = tuple[tuple[int, ...], tuple[int, ...]]
"""A row: its token ids, and its labels."""


@dataclass(frozen=True)
class Targets:
    """What a teacher expects at the scored positions of some rows.

    tokens: int32 [positions, top], the most likely next ones; log_probs: fp32, theirs. places: where the positions of a
    row are.
    """

    tokens: Tensor
    log_probs: Tensor
    places: dict[Tokens, slice]

    def of(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and log_probs of a padded batch of these rows, in any order, one row after the other."""
        places, device = [self.places[row] for row in _rows_of(batch)], batch["input_ids"].device
        tokens, log_probs = (torch.cat([part[place] for place in places]) for part in (self.tokens, self.log_probs))
        return tokens.long().to(device), log_probs.to(device)


def _rows_of(batch: dict[str, Tensor]) -> list[Tokens]:
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    return [(tuple(a[:n]), tuple(b[:n])) for a, b, n in zip(ids, labels, lengths, strict=True)]


@torch.no_grad()
def teacher_targets(stream: LayerStream, rows: Sequence[Row], top: int, folder: Path, reporter: Reporter) -> Targets:
    """The `top` most likely next tokens at every scored position of `rows`, of the model behind `stream`.

    Hidden states between layers wait in a file in `folder`. Peak bytes: the stream's, the activations of one batch in
    one layer, and 8 `top` for each token.
    """
    batches = batches_of(rows, stream.device)
    arguments = Arguments(stream, batches)
    places: dict[Tokens, slice] = {}
    found, end = [], 0
    with Scratch(folder) as boundary, reporter.progress("asking the full model", len(stream)) as advance:
        for number, batch in enumerate(batches):
            boundary.write(number, stream.start(batch.inputs).hidden)
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                for number in range(len(batches)):
                    states = boundary.read(number, stream.device)
                    boundary.write(number, layer(states, **arguments.of(number, index)))
            advance()
        for number, batch in enumerate(batches):
            states = boundary.read(number, stream.device)
            found.append(stream.finish(partial(_most_likely, top), states, batch.inputs))
            for row in _rows_of(batch.inputs):
                count = sum(label != IGNORED for label in row[1][1:])
                places[row] = slice(end, end + count)
                end += count
    return Targets(torch.cat([tokens for tokens, _ in found]), torch.cat([probs for _, probs in found]), places)


def summed_distillation(targets: Targets, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Summed Kullback-Leibler divergence of the model's next-token predictions from the teacher's, over scored
    positions, a scalar: of the teacher's most likely tokens one by one, and of all others taken together.

    Not above the divergence over the whole vocabulary, but for rounding. Peak bytes: as `summed_loss`.
    """
    tokens, wanted = targets.of(batch)
    states, head, cap = predicting_states(model, batch), model.get_output_embeddings(), cap_of(model)
    total = states.new_zeros(())
    for start in range(0, len(states), HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        total = total + checkpoint(
            _divergence, head, cap, states[part], tokens[part], wanted[part], use_reentrant=False
        )
    return total


def _most_likely(top: int, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, log_probs = [], []
    head, cap = model.get_output_embeddings(), cap_of(model)
    for states in predicting_states(model, batch).split(HEAD_ROWS):
        found = logits_of(head, cap, states).log_softmax(dim=-1).topk(top, dim=-1)
        tokens.append(found.indices.int().cpu())
        log_probs.append(found.values.cpu())
    return torch.cat(tokens), torch.cat(log_probs)


def _divergence(head: nn.Module, cap: float | None, states: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
    found = logits_of(head, cap, states).log_softmax(dim=-1).gather(1, tokens)
    return nn.functional.kl_div(_with_rest(found), _with_rest(wanted), reduction="sum", log_target=True)


def _with_rest(log_probs: Tensor) -> Tensor:
    """Beside log-probabilities of some tokens that of all others: [positions, top + 1]."""
    rest = (1 - log_probs.exp().sum(dim=1, keepdim=True)).clamp(min=_LEAST).log()
    return torch.cat([log_probs, rest], dim=1)

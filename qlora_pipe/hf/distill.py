"""Distillation from a teacher on disk: its most likely next tokens, and how far a model is from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_pipe.artifacts.scratch import Scratch
from qlora_pipe.events import Reporter
from qlora_pipe.footprint import HEAD_ROWS
from qlora_pipe.hf.calibration import Arguments, batches_of
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.loss import cap_of, logits_of, over_head_rows, predicting_states, scored_tokens
from qlora_pipe.hf.sequences import IGNORED, Row

# A model's probability of all other tokens is at least this: its logarithm stays finite.
_LEAST = 1e-6


@dataclass(frozen=True)
class Targets:
    """What a teacher expects at the scored positions of some rows.

    tokens: int32 [positions, top], the most likely next ones; log_probs: fp32, theirs. places: where the positions of a
    row are, by its mark.
    """

    tokens: Tensor
    log_probs: Tensor
    places: dict[bytes, slice]

    def of(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and log_probs of a padded batch of these rows, in any order, one row after the other."""
        places, device = [self.places[mark] for mark in _marks(batch)], batch["input_ids"].device
        tokens, log_probs = (torch.cat([part[place] for place in places]) for part in (self.tokens, self.log_probs))
        return tokens.long().to(device), log_probs.to(device)


def _marks(batch: dict[str, Tensor]) -> list[bytes]:
    """One for each row of a padded batch, of all that its predictions depend on: token ids, labels and positions up to
    the last scored token."""
    ids, labels = batch["input_ids"], batch["labels"]
    positions = batch.get("position_ids", torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
    found = []
    for row in torch.stack([ids, labels, positions], dim=1).cpu():
        end = max((row[1] != IGNORED).nonzero().flatten().tolist(), default=-1) + 1
        found.append(sha256(row[:, :end].contiguous().numpy().tobytes()).digest())
    return found


@torch.no_grad()
def teacher_targets(stream: LayerStream, rows: Sequence[Row], top: int, folder: Path, reporter: Reporter) -> Targets:
    """The `top` most likely next tokens at every scored position of `rows`, of the model behind `stream`.

    Hidden states between layers wait in a file in `folder`. Peak bytes: the stream's, the activations of one batch in
    one layer, and 8 `top` for each token; on disk the hidden states of all tokens once.
    """
    batches = batches_of(rows, stream.device)
    arguments = Arguments(stream, batches)
    places: dict[bytes, slice] = {}
    found, end = [], 0
    with Scratch(folder) as boundary, reporter.progress("asking the full model", len(stream)) as advance:
        for number, batch in enumerate(batches):
            boundary.write(number, stream.start(batch.inputs).hidden)
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                for number in range(len(batches)):
                    states = boundary.read(number, stream.device)
                    boundary.write(number, layer(states, **arguments.of(number, index)))
            advance(f"layer {index}")
        for number, batch in enumerate(batches):
            states = boundary.read(number, stream.device)
            found.append(stream.finish(partial(_most_likely, top), states, batch.inputs))
            counts = (batch.inputs["labels"][:, 1:] != IGNORED).sum(dim=1).tolist()
            for mark, count in zip(_marks(batch.inputs), counts, strict=True):
                places[mark] = slice(end, end + count)
                end += count
    return Targets(torch.cat([tokens for tokens, _ in found]), torch.cat([probs for _, probs in found]), places)


def summed_distillation(targets: Targets, share: float, model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """`share` times the summed Kullback-Leibler divergence of the model's next-token predictions from the teacher's,
    and 1 - `share` times the cross entropy of `summed_loss`, over the same positions: a scalar.

    The divergence is of the teacher's most likely tokens one by one, and of all others taken together: not above that
    over the whole vocabulary, but for rounding. Peak bytes: as `summed_loss`.
    """
    tokens, wanted = targets.of(batch)
    beside = (tokens, wanted, scored_tokens(batch))
    return over_head_rows(model, partial(_mixed, share), predicting_states(model, batch), *beside)


def _most_likely(top: int, model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    tokens, log_probs = [], []
    head, cap = model.get_output_embeddings(), cap_of(model)
    for states in predicting_states(model, batch).split(HEAD_ROWS):
        found = logits_of(head, cap, states).log_softmax(dim=-1).topk(top, dim=-1)
        tokens.append(found.indices.int().cpu())
        log_probs.append(found.values.cpu())
    return torch.cat(tokens), torch.cat(log_probs)


def _mixed(share: float, logits: Tensor, tokens: Tensor, wanted: Tensor, following: Tensor) -> Tensor:
    found = logits.log_softmax(dim=-1)
    best = _with_rest(found.gather(1, tokens))
    total = share * functional.kl_div(best, _with_rest(wanted), reduction="sum", log_target=True)
    return total if share == 1 else total + (1 - share) * functional.nll_loss(found, following, reduction="sum")


def _with_rest(log_probs: Tensor) -> Tensor:
    """Beside log-probabilities of some tokens that of all others: [positions, top + 1]."""
    rest = (1 - log_probs.exp().sum(dim=1, keepdim=True)).clamp(min=_LEAST).log()
    return torch.cat([log_probs, rest], dim=1)

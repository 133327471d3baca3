"""What a model loses without some of a layer's groups, measured by leaving them out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlora_pipe.errors import StageError
from qlora_pipe.hf.loss import divergence, predicting_states
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row, collate
from qlora_pipe.memory import EVALUATION_TOKENS


class Removal:
    """How far the predictions of a model move when groups go, on the same rows of text each time.

    Peak bytes: a forward pass of EVALUATION_TOKENS tokens, or of one row if it has more; what is kept are final hidden
    states, 4 x hidden bytes a token.
    """

    @torch.no_grad()
    def __init__(self, model: Model, rows: Sequence[Row]) -> None:
        size = max(1, EVALUATION_TOKENS // max(len(row.input_ids) for row in rows))
        device = next(model.parameters()).device
        self._model, self._tokens = model, sum(row.scored for row in rows)
        self._batches = [
            {name: tensor.to(device) for name, tensor in collate(rows[start : start + size]).items()}
            for start in range(0, len(rows), size)
        ]
        self._whole = [predicting_states(model, batch) for batch in self._batches]

    @torch.no_grad()
    def divergence(self, name: str, kept: Tensor, mean: Tensor | None = None) -> float:
        """Mean Kullback-Leibler divergence (nats a token) from the whole model while the linear map `name` reads zeros
        where its inputs are not `kept`, or their `mean` [in].

        `kept` int64 [n], of an o or down projection: what only the other inputs carry is what leaves with their groups,
        so this is the model that has them cut out, and the mean left behind as a bias, to rounding. Raises StageError
        if predictions are not finite.
        """

        def masked(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            mask = inputs[0].new_zeros(inputs[0].shape[-1]).index_fill_(0, kept.to(inputs[0].device), 1)
            left = inputs[0] * mask
            return (left if mean is None else left + (1 - mask) * mean.to(mask),)

        handle = self._model.get_submodule(name).register_forward_pre_hook(masked)
        try:
            total = sum(
                divergence(self._model, self._model, whole, predicting_states(self._model, batch)).double()
                for whole, batch in zip(self._whole, self._batches, strict=True)
            )
        finally:
            handle.remove()
        found = float(total) / self._tokens
        if not math.isfinite(found):
            raise StageError(f"{name}: without some of its inputs the model predicts {found}; its weights are broken")
        # Rounding may leave less than nothing where nothing changes.
        return max(0.0, found)

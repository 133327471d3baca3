"""One decoder layer at a time: a model whose blocks come from disk when they run and are gone after."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_pipe.architectures import MODULE, Architecture
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.model import LinearOf, TensorOf, empty_model, finished, put_module, put_tensor
from qlora_pipe.hf.sequences import attending

T = TypeVar("T")

Batch = dict[str, Tensor]
"""As `collate` makes it: input_ids, labels, and attention_mask or position_ids, each [rows, tokens]."""

LayerArguments = dict[str, Any]
"""What the model passes to one decoder layer beside hidden states: mask, rotary tables, positions."""


@dataclass(frozen=True)
class Start:
    """What enters the blocks: hidden states [rows, tokens, hidden], and the arguments of each layer."""

    hidden: Tensor
    arguments: tuple[LayerArguments, ...]


class LayerStream:
    """The decoder layers of a model, loaded one by one; embedding, final norm and head stay.

    `linear` and `other` say where tensors come from, as for hf.model.build: a checkpoint, or another artifact.
    Raises SourceError for a parameter that the architecture does not describe. Peak bytes: embedding and head, and
    one layer, in what the callables return.
    """

    def __init__(
        self, config: dict[str, Any], architecture: Architecture, linear: LinearOf, other: TensorOf, *, device: str
    ) -> None:
        self.architecture, self.device = architecture, device
        self._linear, self._other = linear, other
        model = empty_model(config)
        self._layer_type = type(model.model.layers[0])
        model.model.layers = nn.ModuleList(_Boundary() for _ in architecture.layers)
        self._inner: dict[int, list[str]] = {layer: [] for layer in range(len(architecture.layers))}
        for name in architecture.others():
            if name.startswith("model.layers."):
                self._inner[int(name.split(".")[2])].append(name)
            else:
                put_tensor(model, name, other(name).to(device))
        if architecture.tied:
            model.tie_weights()
        self._shell = finished(model, device)

    def __len__(self) -> int:
        return len(self.architecture.layers)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """One decoder layer with its weights, frozen, in evaluation mode; drop it when the `with` block ends.

        Called with hidden states and that layer's arguments of start(), it returns hidden states.
        """
        with init_empty_weights(include_buffers=False):
            layer = self._layer_type(self._shell.config, index)
        prefix = f"model.layers.{index}."
        for role, module in MODULE.items():
            put_module(layer, module, self._linear(index, role, prefix + module).to(self.device))
        for name in self._inner[index]:
            put_tensor(layer, name.removeprefix(prefix), self._other(name).to(self.device))
        yield finished(layer, self.device)
        # A caller that keeps the module keeps no weights.
        layer.to("meta")

    @torch.no_grad()
    def start(self, batch: Batch) -> Start:
        """The model's own preparation of a batch."""
        boundaries = self._boundaries()
        self._shell.model(input_ids=batch["input_ids"], use_cache=False, **attending(batch))
        hidden = boundaries[0].seen
        assert hidden is not None
        found = Start(hidden, tuple(boundary.arguments for boundary in boundaries))
        for boundary in boundaries:
            boundary.forget()
        return found

    def loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Summed loss of a batch, given what leaves the last layer [rows, tokens, hidden]."""
        return self.finish(summed_loss, hidden, batch)

    def finish(self, function: Callable[[PreTrainedModel, Batch], T], hidden: Tensor, batch: Batch) -> T:
        """`function` of the model and a batch, where `hidden` is what leaves the last layer."""
        boundaries = self._boundaries()
        boundaries[-1].replacement = hidden
        try:
            return function(self._shell, batch)
        finally:
            for boundary in boundaries:
                boundary.forget()

    def _boundaries(self) -> list["_Boundary"]:
        return list(self._shell.model.layers)


class _Boundary(nn.Module):
    """Stands where a decoder layer was: notes what it is called with, returns hidden states as they come or others."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.seen: Tensor | None = None
        self.arguments: LayerArguments = {}
        self.replacement: Tensor | None = None

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.seen, self.arguments = hidden_states, arguments
        return hidden_states if self.replacement is None else self.replacement

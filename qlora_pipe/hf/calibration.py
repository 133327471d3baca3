"""One calibration pass: hooks on the linear maps of a frozen model."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_pipe.events import Reporter
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.tokens import Row, collate
from quant.moments import DiagonalMoments


def collect(
    model: PreTrainedModel, rows: Sequence[Row], names: Sequence[str], reporter: Reporter
) -> dict[str, DiagonalMoments]:
    """Moments of the named linear maps under the loss of `rows`, one row at a time.

    No weight gets a gradient: the embedding output asks for one, so the chain of output gradients exists. Peak bytes:
    the model and the activations of one row.
    """
    moments = {}
    handles = []
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        moments[name] = DiagonalMoments(module.in_features, module.out_features, device=module.weight.device)
        handles.append(module.register_forward_hook(partial(_watch, moments[name])))
    handles.append(model.get_input_embeddings().register_forward_hook(_ask_for_gradient))
    device = next(model.parameters()).device
    try:
        with reporter.progress("calibrating", len(rows)) as advance:
            for row in rows:
                batch = {key: tensor.to(device) for key, tensor in collate([row]).items()}
                summed_loss(model, batch).backward()
                advance()
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _watch(moments: DiagonalMoments, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    moments.update_input(inputs[0].detach())
    output.register_hook(moments.update_grad)


def _ask_for_gradient(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_(torch.is_grad_enabled())

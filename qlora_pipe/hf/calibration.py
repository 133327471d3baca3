"""Two sweeps over the layers of a frozen model on disk: output gradients, then input covariances.

Hidden states between layers wait in a scratch file, so that every layer is loaded once for many sequences.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune.groups import PRUNED_AXIS, shape_of
from prune.moments import ReaderMoments
from qlora_pipe.architectures import MODULE, SITE, SITES, linear_name
from qlora_pipe.artifacts.scratch import Scratch
from qlora_pipe.errors import StageError
from qlora_pipe.events import Advance, Reporter
from qlora_pipe.hf.layers import LayerArguments, LayerStream
from qlora_pipe.hf.sequences import Row, collate
from qlora_pipe.memory import BOUNDARY_BYTES, CALIBRATION_TOKENS
from quant.exceptions import NonFiniteError
from quant.moments import Covariance, DiagonalMoments, token_weights

_READER = {site: next(role for role in MODULE if SITE[role] == site) for site in SITES}
"""The linear map at which a distinct input is watched."""

_READERS = tuple(role for role in MODULE if PRUNED_AXIS[role] == "columns")
"""Linear maps whose inputs are what pruning removes."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Rows of one length, so without padding, and where their tokens and they themselves are among all."""

    inputs: dict[str, Tensor]
    tokens: slice
    rows: slice


@dataclass(frozen=True)
class Gradients:
    """What the first sweep finds: moments by linear map, of those whose columns are pruned also means and gates, and by
    (layer, site) the squared norms of the gradients.

    A token's norm is summed over the outputs of all linear maps that read the site: fp32 [tokens], on the host.
    """

    moments: dict[str, DiagonalMoments]
    readers: dict[str, ReaderMoments]
    norms: dict[tuple[int, str], Tensor]


def batches_of(rows: Sequence[Row], device: str, together: int = CALIBRATION_TOKENS) -> list[CalibrationBatch]:
    """Rows by length, those of one length together up to so many tokens, at least one row."""
    found: list[CalibrationBatch] = []
    ordered = sorted(rows, key=lambda row: -len(row.input_ids))
    start = tokens = 0
    while start < len(ordered):
        length = len(ordered[start].input_ids)
        end = start + max(1, together // length)
        chosen = [row for row in ordered[start:end] if len(row.input_ids) == length]
        inputs = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
        of_rows = slice(start, start + len(chosen))
        found.append(CalibrationBatch(inputs, slice(tokens, tokens + length * len(chosen)), of_rows))
        start, tokens = start + len(chosen), tokens + length * len(chosen)
    return found


def gradient_sweep(
    stream: LayerStream, batches: Sequence[CalibrationBatch], folder: Path, reporter: Reporter
) -> Gradients:
    """Forward and backward through every layer, each loaded twice for as many batches as BOUNDARY_BYTES hold.

    Gradients are those of the summed loss. Backward runs a layer again from its stored input, so nothing of a layer
    outlives it but that input (activation checkpointing). Raises StageError for NaN or infinity, naming the linear
    map. Peak bytes: the stream's, the activations of one batch in one layer, 16 bytes a token and layer for norms, 8 a
    sequence and input of o and down for gates; on disk BOUNDARY_BYTES, or one batch at every layer if that is more.
    """
    found = Gradients(
        {
            name: DiagonalMoments(shape[1], shape[0], device=stream.device)
            for name, shape in stream.architecture.linear_shapes().items()
        },
        {
            linear_name(layer, role): ReaderMoments(
                shape_of(role, shape)[1], batches[-1].rows.stop, device=stream.device
            )
            for layer, shape in enumerate(stream.architecture.layers)
            for role in _READERS
        },
        {(layer, site): torch.zeros(batches[-1].tokens.stop) for layer in range(len(stream)) for site in SITES},
    )
    groups = list(_groups(stream, batches))
    with reporter.progress("sweeping gradients", 2 * len(stream) * len(groups)) as advance:
        for group in groups:
            with Scratch(folder) as boundary:
                _forward(stream, group, boundary, found, advance)
                for number, batch in enumerate(group):
                    hidden = boundary.read((len(stream), number), stream.device).requires_grad_()
                    _finite(stream.loss(hidden, batch.inputs)).backward()
                    boundary.write((len(stream), number), _gradient_of(hidden))
                _backward(stream, group, boundary, found, advance)
    return found


def _forward(
    stream: LayerStream,
    group: Sequence[CalibrationBatch],
    boundary: Scratch,
    found: Gradients,
    advance: Advance,
) -> None:
    """Input moments; leaves the input of layer l and batch b at (l, b), and what leaves the last layer."""
    starts = Arguments(stream, group)
    for number, batch in enumerate(group):
        boundary.write((0, number), stream.start(batch.inputs).hidden)
    for index in range(len(stream)):
        with stream.layer(index) as layer, torch.no_grad():
            for role in MODULE:
                _watch_input(layer, index, role, found.moments[linear_name(index, role)].update_input)
            for role in _READERS:
                _watch_input(layer, index, role, found.readers[linear_name(index, role)].update_input)
            for number in range(len(group)):
                hidden = boundary.read((index, number), stream.device)
                boundary.write((index + 1, number), layer(hidden, **starts.of(number, index)))
        advance(f"layer {index}")


def _backward(
    stream: LayerStream,
    group: Sequence[CalibrationBatch],
    boundary: Scratch,
    found: Gradients,
    advance: Advance,
) -> None:
    """Gradient moments and norms; (l, b) goes from a layer's input to the gradient with respect to it."""
    starts = Arguments(stream, group)
    for index in reversed(range(len(stream))):
        with stream.layer(index) as layer:
            watchers = [_GradientWatcher(layer, index, role, found) for role in MODULE]
            gates = [_GateWatcher(layer, index, role, found) for role in _READERS]
            for number, batch in enumerate(group):
                for watcher in watchers:
                    watcher.tokens = batch.tokens
                for gate in gates:
                    gate.rows = batch.rows
                hidden = boundary.read((index, number), stream.device).requires_grad_()
                output = layer(hidden, **starts.of(number, index))
                output.backward(boundary.read((index + 1, number), stream.device))
                boundary.write((index, number), _gradient_of(hidden))
        advance(f"layer {index}")


def covariance_sweep(
    stream: LayerStream,
    batches: Sequence[CalibrationBatch],
    norms: Mapping[tuple[int, str], Tensor] | None,
    take: Callable[[int, dict[str, Covariance]], None],
    folder: Path,
    reporter: Reporter,
) -> None:
    """Forward layer by layer, each loaded once; `take` gets a layer's number and its covariances by site, once each.

    Tokens weigh in by `norms` of gradient_sweep, or alike without. The stream may be another than the first sweep's:
    a quantised prefix. Raises StageError for NaN or infinity, naming the linear map. Peak bytes: the stream's, the
    activations of one batch in one layer, and 8 n^2 for each distinct input of n features; on disk the hidden states
    of all tokens once.
    """
    starts = Arguments(stream, batches)
    with Scratch(folder) as boundary, reporter.progress("sweeping covariances", len(stream)) as advance:
        for number, batch in enumerate(batches):
            boundary.write(number, stream.start(batch.inputs).hidden)
        for index in range(len(stream)):
            take(index, _covariances(stream, index, batches, norms, boundary, starts))
            advance(f"layer {index}")


def _covariances(
    stream: LayerStream,
    index: int,
    batches: Sequence[CalibrationBatch],
    norms: Mapping[tuple[int, str], Tensor] | None,
    boundary: Scratch,
    starts: "Arguments",
) -> dict[str, Covariance]:
    """Those of one layer; leaves what leaves the layer in place of what entered."""
    with stream.layer(index) as layer, torch.no_grad():
        watchers = [_CovarianceWatcher(stream, layer, index, site, norms) for site in SITES]
        for number, batch in enumerate(batches):
            for watcher in watchers:
                watcher.tokens = batch.tokens
            hidden = boundary.read(number, stream.device)
            boundary.write(number, layer(hidden, **starts.of(number, index)))
    return {watcher.site: watcher.covariance for watcher in watchers}


class Arguments:
    """Arguments of a stream's layers for each batch. Only the last ones are kept: they depend on a batch's shape alone,
    unless rows share a sequence in it."""

    def __init__(self, stream: LayerStream, batches: Sequence[CalibrationBatch]) -> None:
        self._stream, self._batches = stream, batches
        self._key: tuple[int, ...] | None = None
        self._found: tuple[LayerArguments, ...] = ()

    def of(self, number: int, layer: int) -> LayerArguments:
        inputs = self._batches[number].inputs
        key = (number,) if "position_ids" in inputs else tuple(inputs["input_ids"].shape)
        if key != self._key:
            self._found, self._key = self._stream.start(inputs).arguments, key
        return self._found[layer]


class _GradientWatcher:
    """Takes the output gradients of one linear map."""

    def __init__(self, layer: nn.Module, index: int, role: str, found: Gradients) -> None:
        self.tokens = slice(0)
        self._name = linear_name(index, role)
        self._moments = found.moments[self._name]
        self._norms = found.norms[index, SITE[role]]
        layer.get_submodule(MODULE[role]).register_forward_hook(self._seen)

    def _seen(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(partial(_named, self._name, self._update))

    def _update(self, gradient: Tensor) -> None:
        norms = gradient.float().square().sum(dim=-1).flatten().cpu()
        if not bool(torch.isfinite(norms).all()):
            raise NonFiniteError("gradients, or their squares in fp32, hold NaN or infinity")
        self._moments.update_grad(gradient)
        self._norms[self.tokens] += norms


class _GateWatcher:
    """Takes the inputs of one linear map whose columns are pruned, each with its gradient."""

    def __init__(self, layer: nn.Module, index: int, role: str, found: Gradients) -> None:
        self.rows = slice(0)
        self._name = linear_name(index, role)
        self._moments = found.readers[self._name]
        layer.get_submodule(MODULE[role]).register_forward_pre_hook(self._seen)

    def _seen(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Without its graph, which would hold the hook, and the hook it.
        update = partial(self._update, inputs[0].detach())
        inputs[0].register_hook(partial(_named, self._name, update))

    def _update(self, values: Tensor, gradient: Tensor) -> None:
        self._moments.update_gates(values, gradient, self.rows)
        if not bool(torch.isfinite(self._moments.gates[self.rows]).all()):
            raise NonFiniteError("gradients of inputs hold NaN or infinity")


class _CovarianceWatcher:
    """Takes one distinct input of a layer, with the weights of its tokens."""

    def __init__(
        self,
        stream: LayerStream,
        layer: nn.Module,
        index: int,
        site: str,
        norms: Mapping[tuple[int, str], Tensor] | None,
    ) -> None:
        self.site, self.tokens = site, slice(0)
        self.covariance = Covariance(stream.architecture.site_width(index, site), device=stream.device)
        self._weights = None if norms is None else token_weights(norms[index, site])
        _watch_input(layer, index, _READER[site], self._update)

    def _update(self, hidden: Tensor) -> None:
        weights = None if self._weights is None else self._weights[self.tokens].reshape(hidden.shape[:-1])
        self.covariance.update(hidden, weights)


def _groups(stream: LayerStream, batches: Sequence[CalibrationBatch]) -> Iterator[Sequence[CalibrationBatch]]:
    """As many batches at a time as leave their hidden states at every layer within BOUNDARY_BYTES, at least one."""
    per_token = 4 * stream.architecture.hidden * (len(stream) + 1)
    start = 0
    while start < len(batches):
        end = start + 1
        first = batches[start].tokens.start
        while end < len(batches) and (batches[end].tokens.stop - first) * per_token <= BOUNDARY_BYTES:
            end += 1
        yield batches[start:end]
        start = end


def _watch_input(layer: nn.Module, index: int, role: str, update: Callable[[Tensor], None]) -> None:
    def seen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        _named(linear_name(index, role), update, inputs[0])

    layer.get_submodule(MODULE[role]).register_forward_pre_hook(seen)


def _named(name: str, update: Callable[[Tensor], None], values: Tensor) -> None:
    try:
        update(values)
    except NonFiniteError as error:
        raise StageError(f"{name}: {error}; the model overflows on the calibration text, try dtype float32") from error


def _finite(loss: Tensor) -> Tensor:
    if not math.isfinite(loss.item()):
        raise StageError(
            f"the loss of the model on the calibration text is {loss.item()}; its weights are broken, or overflow in "
            "this dtype: try dtype float32"
        )
    return loss


def _gradient_of(hidden: Tensor) -> Tensor:
    assert hidden.grad is not None
    return hidden.grad

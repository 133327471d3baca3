"""LoRAPrune's loop (arXiv 2305.18403): while an adapter learns generic text, its gradients rank the groups of every
layer, and a growing share of the weakest is masked; the adapter goes on to make up for them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from prune.average import MovingAverage
from prune.groups import ROLES, LayerShape, group_width
from prune.indexmap import IndexMap, LayerKept
from prune.lora_guided import Adapter, guided, side_matched
from prune.members import MemberScores
from prune.schedule import mask_updates
from prune.select import keep_best
from qlora_pipe.architectures import linear_name
from qlora_pipe.config_training import Guide
from qlora_pipe.errors import StageError
from quant.linear import PackedLinear

Scores = dict[int, dict[str, Tensor]]
"""Layer to the scores of its groups by kind."""

# Of a group that is not masked, so that it is never taken for one.
_LEAST = torch.finfo(torch.float64).tiny

_MASKED = {"kv": "v", "ffn": "up"}
"""The linear map whose outputs a mask covers. A head without values and a channel without up add exactly nothing, so
neither do they get a gradient."""


class Ramp:
    """Masks over the groups of a packed model, and the scores that set them.

    `modules`: name to packed map with its adapter attached. `counts`: KV groups and FFN channels of every layer that
    stay in the end; layers that stay whole are not scored. Give it to `training.train` as `watch`. A group that is
    masked stays so: it is scored 0, and every other more. With `settings.shrink` the maps compute without what is
    masked. Peak bytes beside the training: one dense matrix and the chunks of its score, at every step up to the last
    masks; the packed rows that stay, if maps shrink.
    """

    def __init__(
        self,
        modules: Mapping[str, PackedLinear],
        shapes: Sequence[LayerShape],
        settings: Guide,
        counts: Sequence[tuple[int, int]],
    ) -> None:
        self._modules, self._settings = modules, settings
        self._shapes = {
            layer: shape
            for layer, (shape, count) in enumerate(zip(shapes, counts, strict=True))
            if count != (shape.kv_heads, shape.ffn)
        }
        self._counts = [counts[layer] for layer in self._shapes]
        # Shares of what is to go in the end; the schedule itself takes no target of 1.
        halves = mask_updates(
            settings.steps, 0.5, warmup=settings.start, cooldown=settings.cooldown, interval=settings.interval
        )
        self._due = {step: 2 * half for step, half in halves}
        self._average = MovingAverage(self._free, settings.decay)
        self.masks = {
            layer: {kind: torch.ones(shape.group_count(kind), dtype=torch.float64) for kind in _MASKED}
            for layer, shape in self._shapes.items()
        }
        self.scores: Scores = {}
        for layer, shape in self._shapes.items() if not settings.shrink else ():
            for kind, role in _MASKED.items():
                self._map(layer, role).register_forward_hook(self._masking(layer, kind, group_width(role, shape)))

    @property
    def _free(self) -> list[LayerShape]:
        return list(self._shapes.values())

    def match_sides(self, generator: torch.Generator) -> None:
        """Start the adapters of o and down with B random and A zero, in place of A random and B zero: seen through B,
        gradients tell the columns apart, which are what goes of these maps."""
        for layer, shape in self._shapes.items():
            for role in ("o", "down"):
                module = self._map(layer, role)
                assert module.task_a is not None
                assert module.task_b is not None
                rank, out = len(module.task_a), len(module.task_b)
                _, drawn = side_matched(role, shape, rank, generator)
                with torch.no_grad():
                    module.task_a.zero_()
                    # As large as LoRA's random A is: the learning rate is meant for that.
                    module.task_b.copy_(drawn * (rank / (3 * out)) ** 0.5)

    def before_step(self, step: int) -> None:
        """Take in the gradients of optimiser step `step`, counted from 0, and renew the masks if it is time."""
        if step > max(self._due):
            return
        self._average.update([self._layer_scores(layer) for layer in self._shapes])
        if step in self._due:
            self._renew(self._due[step])

    def after_last_step(self) -> None:
        """The last renewal, if the schedule has no cool-down."""
        if self._settings.steps in self._due:
            self._renew(self._due[self._settings.steps])

    def state(self) -> dict[str, Tensor]:
        """All it needs to go on."""
        average = dict(zip(self._shapes, self._average.scores(), strict=True))
        parts = {"mask": self.masks, "average": average, "score": self.scores}
        return {
            f"{name}.{layer}.{kind}": values
            for name, layers in parts.items()
            for layer, found in layers.items()
            for kind, values in found.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""

        def part(name: str) -> Scores:
            return {
                layer: {kind: state[f"{name}.{layer}.{kind}"] for kind in _MASKED}
                for layer in self._shapes
                if f"{name}.{layer}.kv" in state
            }

        self._average = MovingAverage(self._free, self._settings.decay, list(part("average").values()))
        self.masks, self.scores = part("mask"), part("score")
        if self._settings.shrink:
            self._shrink()

    def _renew(self, share: float) -> None:
        """Mask so large a share of what is to go in the end."""
        average = self._average.scores()
        if not any(bool(values.any()) for layer in average for values in layer.values()):
            raise StageError("no step so far had finite gradients to rank groups by; lower guide.learning_rate")
        self.scores = {
            layer: {kind: values.clamp(min=_LEAST) * self.masks[layer][kind] for kind, values in found.items()}
            for layer, found in zip(self._shapes, average, strict=True)
        }
        now = [
            (_left(shape.kv_heads, kv_heads, share), _left(shape.ffn, ffn, share))
            for shape, (kv_heads, ffn) in zip(self._free, self._counts, strict=True)
        ]
        kept = keep_best(list(self.scores.values()), self._free, now)
        for mask, layer in zip(self.masks.values(), kept.layers, strict=True):
            for kind, indices in (("kv", layer.kv_heads), ("ffn", layer.ffn)):
                mask[kind] = torch.zeros_like(mask[kind]).index_fill_(0, torch.tensor(indices), 1)
        if self._settings.shrink:
            self._shrink()

    def _shrink(self) -> None:
        """Leave out of the maps what is masked."""
        for layer, shape in self._shapes.items():
            kv_heads, ffn = (tuple(self.masks[layer][kind].nonzero().flatten().tolist()) for kind in ("kv", "ffn"))
            kept = IndexMap((LayerKept(kv_heads, ffn),), (shape,))
            if kept.kept_shape(0) != shape:
                for role in ROLES:
                    self._map(layer, role).narrow(kept.kept_indices(0, role))

    def _layer_scores(self, layer: int) -> dict[str, Tensor]:
        shape, members = self._shapes[layer], MemberScores(self._shapes[layer])
        for role in ROLES:
            module = self._map(layer, role)
            a, b = module.task_a, module.task_b
            assert a is not None
            assert b is not None
            assert a.grad is not None
            assert b.grad is not None
            adapter = Adapter(a.detach(), b.detach(), a.grad, b.grad, module.task_scale)
            members.add(role, guided(role, adapter, module.dequantized(), shape, eta=self._settings.eta))
        return members.scores()

    def _masking(self, layer: int, kind: str, width: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def masked(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output * self.masks[layer][kind].to(output).repeat_interleave(width)

        return masked

    def _map(self, layer: int, role: str) -> PackedLinear:
        return self._modules[linear_name(layer, role)]


def _left(total: int, final: int, share: float) -> int:
    return total - round((total - final) * share)

"""What the tests of fake-quantised layers share: the weight by plain autograd, and a count of live bytes."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant import grid


def surrogate_weight(weight, lora_a, lora_b, scale, offset, alpha, bits, residual=None, *, half=False):
    """W_q by plain autograd: straight-through rounding, mask of the clamp on the unrounded code."""
    low, high = grid.bounds(bits)
    grouped = (weight + alpha * lora_b @ lora_a).reshape(*scale.shape, -1)
    offset = 0.5 * scale if half else offset
    shift = 0.0 if offset is None else offset.unsqueeze(-1)
    clamped = ((grouped - shift) / scale.unsqueeze(-1)).clamp(low, high)
    residual = (clamped.round() - clamped).detach() if residual is None else residual
    return ((clamped + residual) * scale.unsqueeze(-1) + shift).reshape(weight.shape), residual


class LiveStorages(TorchDispatchMode):
    """Live bytes of storages born under the mode, counted after every operation; views of older ones are
    free."""

    def __init__(self, existing):
        super().__init__()
        self.existing = {t.untyped_storage()._cdata for t in existing}
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.existing:
                    self.born[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.shapes.add(tuple(leaf.shape))
        self.peak = max(self.peak, sum(self.live()))
        return out

    def live(self) -> list[int]:
        self.born = {k: v for k, v in self.born.items() if not v[0].expired()}
        return [nbytes for _, nbytes in self.born.values()]

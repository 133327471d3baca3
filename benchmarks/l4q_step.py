"""One L4Q training step of a [1536, 576] layer on 512 tokens, beside plain autograd and beside PEFT's LoRA.

    python benchmarks/l4q_step.py [--short] [--json FILE]

Each row is {measure, ours, peer, ratio, bar, holds, spread}: medians of paired runs (ours and the peer take
turns, so load on the machine meets both); ratio and spread are the median and the quartile distance of the
ratios of the pairs. Seconds are wall time of forward + backward. Saved bytes are the distinct storages that
autograd keeps, weights and input included; peak bytes those of all tensors alive in forward and backward, weights and
input included. A bar is the largest ratio that is accepted.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any

import rows
import torch
from rows import Row
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quant import grid
from quant.blockwise import quantize
from quant.buffers import packed_buffers
from quant.fakequant import L4QLinear
from quant.linear import PackedLinear
from quant.start import first_codes, packed_into_cells
from quant.storage import Choice, PackedShape

OUT, IN, TOKENS, RANK, BITS, GROUP = 1536, 576, 512, 16, 4, 64

Step = Callable[[], None]


class PlainL4Q(nn.Module):
    """The same function written with autograd operations: every intermediate of the weight is kept."""

    def __init__(self, twin: L4QLinear) -> None:
        super().__init__()
        self.twin = twin

    def forward(self, x: Tensor) -> Tensor:
        t = self.twin
        merged = t.weight + t.alpha * (t.lora_b @ t.lora_a)
        real = merged.view(*t.scale.shape, -1) / t.scale.unsqueeze(-1)
        clamped = real.clamp(*grid.bounds(t.bits))
        codes = clamped + (clamped.round() - clamped).detach()
        return x @ (codes * t.scale.unsqueeze(-1)).view_as(merged).t()


def packed(weight: Tensor, bits: int) -> PackedLinear:
    shape = PackedShape(IN, OUT, Choice("nf", bits, 64, 32), transposed=False)
    layer = PackedLinear(shape)
    factors = (torch.zeros(OUT, 32, dtype=torch.bfloat16), torch.zeros(32, IN, dtype=torch.bfloat16), None)
    layer.load_state_dict(packed_buffers(quantize(weight, shape.choice), factors, shape))
    return layer


def step(module: nn.Module, x: Tensor, grad_y: Tensor) -> Step:
    def run() -> None:
        module.zero_grad()
        module(x).backward(grad_y)

    return run


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that one forward saves for backward."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(saved.values())


def paired(measure: str, ours: Step, peer: Step, bar: float | None, repeats: int) -> Row:
    """Row of times; ``bar`` is the largest accepted ratio ours / peer."""
    for warm in (ours, peer, ours, peer):
        warm()
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(repeats):
        order = ((0, ours), (1, peer)) if index % 2 == 0 else ((1, peer), (0, ours))
        for slot, run in order:
            start = time.perf_counter()
            run()
            times[slot].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    medians = statistics.median(times[0]), statistics.median(times[1])
    return row(measure, *medians, statistics.median(ratios), bar, quartiles[2] - quartiles[0])


def row(measure: str, ours: float, peer: float, ratio: float, bar: float | None, spread: float = 0.0) -> Row:
    """A row whose ratio, ours / peer, may be at most ``bar``."""
    text = "-" if bar is None else f"<= {bar:g}"
    return Row(measure, ours, peer, ratio, text, None if bar is None else ratio <= bar, spread)


def sizes(measure: str, ours: int, peer: int, bar: float | None) -> Row:
    return row(measure, ours, peer, ours / peer, bar)


def measure(short: bool) -> Iterator[Row]:
    """Every row; the short form repeats less."""
    from peft import LoraConfig, inject_adapter_in_model

    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    gc.disable()
    repeats = 9 if short else 41
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN, generator=generator, requires_grad=True)
    grad_y = torch.randn(TOKENS, OUT, generator=generator)
    linear = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    weight = linear.weight.detach().clone()
    ours = L4QLinear(weight, None, bits=BITS, group_size=GROUP, rank=RANK, alpha=2.0, generator=generator)
    plain = PlainL4Q(ours)
    torch.testing.assert_close(plain(x), ours(x), rtol=1e-4, atol=1e-4)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["0"])
    lora = inject_adapter_in_model(config, nn.Sequential(linear))
    yield paired("L4Q step seconds / PEFT LoRA", step(ours, x, grad_y), step(lora, x, grad_y), 1.6, repeats)
    yield paired("L4Q step seconds / plain autograd", step(ours, x, grad_y), step(plain, x, grad_y), 1.0, repeats)
    yield sizes("L4Q saved bytes / PEFT LoRA", saved_bytes(ours, x), saved_bytes(lora, x), 1.1)
    yield sizes("L4Q saved bytes / plain autograd", saved_bytes(ours, x), saved_bytes(plain, x), 0.5)
    yield from packed_rows(weight, ours, x, grad_y, repeats)
    frozen = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
    for bits in (3, 4):
        name = f"PackedLinear {bits}-bit rank 32 step seconds / frozen nn.Linear"
        yield paired(name, step(packed(weight, bits), x, grad_y), step(frozen, x, grad_y), None, repeats)


def packed_rows(weight: Tensor, dense: L4QLinear, x: Tensor, grad_y: Tensor, repeats: int) -> Iterator[Row]:
    """The same step with the frozen weight packed: bytes of it, of all that is saved, and the peak of a step
    beside those of a bf16 weight; seconds beside the dense fp32 weight."""
    for bits, width in ((4, 8), (2, 8), (2, 4)):
        kind: grid.OffsetKind = "half" if bits == 2 else "zero"
        codes, scale, _ = first_codes(weight, bits, GROUP, method="mse", offset=kind)
        frozen = packed_into_cells(weight, codes, scale, bits=bits, half=bits == 2, packed_bits=width)
        given = {"bits": bits, "group_size": GROUP, "rank": RANK, "alpha": 2.0, "steps": (scale, None), "offset": kind}
        packed_layer, half_layer = (
            L4QLinear(kept, None, generator=torch.Generator().manual_seed(0), **given)
            for kept in (frozen, weight.bfloat16())
        )
        name = f"L4Q {bits}-bit, frozen weight in {width} bits"
        kept = sum(tensor.numel() * tensor.element_size() for tensor in frozen.buffers())
        yield sizes(f"{name}, its bytes / bf16", kept, 2 * weight.numel(), 0.6)
        found = (saved_bytes(packed_layer, x), saved_bytes(half_layer, x))
        yield sizes(f"{name}, saved bytes / bf16", *found, 0.9)
        peaks = (peak_bytes(packed_layer, x, grad_y), peak_bytes(half_layer, x, grad_y))
        yield sizes(f"{name}, peak bytes of a step / bf16", *peaks, 1.0)
        yield paired(
            f"{name}, step seconds / dense", step(packed_layer, x, grad_y), step(dense, x, grad_y), None, repeats
        )


def peak_bytes(module: nn.Module, x: Tensor, grad_y: Tensor) -> int:
    """Most bytes of tensors alive in forward and backward, what the layer is made of and the input included."""
    kept = [*module.state_dict().values(), x]
    sizes_of = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    module.zero_grad()
    with LiveBytes(sizes_of) as live:
        module(x).backward(grad_y)
    return sum(sizes_of.values()) + live.peak


class LiveBytes(TorchDispatchMode):
    """Most bytes of storages born under the mode that were alive together, looked at after every operation."""

    def __init__(self, existing: Container[int]) -> None:
        super().__init__()
        self.existing, self.peak = existing, 0
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self.existing:
                storage = leaf.untyped_storage()
                self.born[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.born = {key: entry for key, entry in self.born.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.born.values()))
        return out


if __name__ == "__main__":
    rows.run("One L4Q training step beside plain autograd and PEFT's LoRA.", measure)

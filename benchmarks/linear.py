"""The packed linear map beside bitsandbytes' Linear4bit and a dense fp32 nn.Linear, on the CPU.

Seconds are medians; the two sides alternate, and the ratio is the median of the ratios ours / peer of the pairs, its
spread their interquartile range. Both packed sides hold NF4 codes in blocks of 64; ours has double-quantised scales,
bitsandbytes fp32 ones (compress_statistics is off) and no low-rank part, so ours has rank 0. The last rows compare
rebuilding a weight by table with unpacking it first, and with the same table under torch.compile.
"""

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import rows
import torch
from rows import Row
from torch import Tensor, nn

from quant.blockwise import dequantize, quantize
from quant.buffers import packed_buffers
from quant.linear import PackedLinear
from quant.lookup import dequantize_packed
from quant.pack import pack, unpack
from quant.storage import Choice, PackedShape

CHOICE = Choice("nf", 4, 64, 0)
TOKENS = (1, 16, 128)

Step = Callable[[], object]


def packed(weight: Tensor) -> PackedLinear:
    out_features, in_features = weight.shape
    shape = PackedShape(in_features, out_features, CHOICE, transposed=False)
    layer = PackedLinear(shape)
    factors = (torch.zeros(out_features, 0).bfloat16(), torch.zeros(0, in_features).bfloat16(), None)
    layer.load_state_dict(packed_buffers(quantize(weight, CHOICE), factors, shape))
    return layer


def linear4bit(weight: Tensor) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.float32, compress_statistics=False,
        quant_type="nf4",
    )  # fmt: skip
    layer.weight = Params4bit(weight.clone(), requires_grad=False, compress_statistics=False, quant_type="nf4")
    return layer.to("cpu")


def dense(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    layer.weight.data = weight
    return layer


def forward(layer: nn.Module, x: Tensor) -> Step:
    def run() -> object:
        with torch.no_grad():
            return layer(x)

    return run


def step(layer: nn.Module, x: Tensor, grad_y: Tensor) -> Step:
    x = x.clone().requires_grad_()

    def run() -> None:
        x.grad = None
        layer(x).backward(grad_y)

    return run


def paired(measure: str, ours: Step, peer: Step, repeats: int) -> Row:
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
    low, ratio, high = statistics.quantiles(ratios, n=4)
    return Row(measure, statistics.median(times[0]), statistics.median(times[1]), ratio, "-", None, high - low)


def layers(size: int, generator: torch.Generator, repeats: int) -> Iterator[Row]:
    weight = torch.randn(size, size, generator=generator) * 0.02
    ours, peers = packed(weight), {"Linear4bit": linear4bit(weight), "dense fp32": dense(weight)}
    x = torch.randn(TOKENS[-1], size, generator=generator)
    # Another codebook entry here and there, and other scales: near, not equal.
    torch.testing.assert_close(ours(x), peers["Linear4bit"](x), rtol=0.1, atol=0.1)
    for tokens in TOKENS:
        x = torch.randn(tokens, size, generator=generator)
        for name, peer in peers.items():
            where = f"{size}x{size}, {tokens} tokens: seconds / {name}"
            yield paired(f"forward {where}", forward(ours, x), forward(peer, x), repeats)
            grad_y = torch.randn(tokens, size, generator=generator)
            yield paired(f"forward + backward {where}", step(ours, x, grad_y), step(peer, x, grad_y), repeats)


def conversions(size: int, generator: torch.Generator, repeats: int) -> Iterator[Row]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(size, size, generator=generator) * 0.02
    layer = packed(weight)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    where = f"{size}x{size}: seconds / bitsandbytes"
    yield paired(
        f"dequantise NF4 {where}", lambda: layer.dequantized(False), lambda: dequantize_4bit(codes, state), repeats
    )
    yield paired(
        f"quantise and pack NF4 {where}",
        lambda: pack(quantize(weight, CHOICE).codes, 4),
        lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4"),
        repeats,
    )


def tables(size: int, generator: torch.Generator, repeats: int) -> Iterator[Row]:
    compiled = torch.compile(dequantize_packed, dynamic=False)
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (size // 4, size), dtype=torch.uint8, generator=generator)
        words, scale = pack(codes, bits), torch.rand(size // 4, size // 64, generator=generator)
        levels = torch.randn(2**bits, generator=generator).sort().values
        arguments = (words, bits, size, scale, levels)

        def table(arguments: tuple[Tensor, int, int, Tensor, Tensor] = arguments) -> Tensor:
            return dequantize_packed(*arguments)

        def plain(arguments: tuple[Tensor, int, int, Tensor, Tensor] = arguments) -> Tensor:
            words, bits, columns, scale, levels = arguments
            return dequantize(unpack(words, bits, columns), scale, levels)

        def faster(arguments: tuple[Tensor, int, int, Tensor, Tensor] = arguments) -> Tensor:
            return compiled(*arguments)

        assert torch.equal(table(), plain())
        assert torch.equal(table(), faster())
        where = f"{bits}-bit {size // 4}x{size} by table: seconds"
        yield paired(f"{where} / unpacking first", table, plain, repeats)
        yield paired(f"{where} / the table compiled", table, faster, repeats)


def measure(short: bool) -> Iterator[Row]:
    """Every row; the short form repeats less."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    repeats = 9 if short else 41
    generator = torch.Generator().manual_seed(0)
    for size in (1024, 2048):
        yield from layers(size, generator, repeats)
        yield from conversions(size, generator, repeats)
    yield from tables(1024, generator, repeats)


if __name__ == "__main__":
    rows.run("PackedLinear beside bitsandbytes' Linear4bit and a dense nn.Linear.", measure)

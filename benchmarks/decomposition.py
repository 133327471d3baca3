"""Perplexity of decomposed models on held-out text: ours beside plain NormalFloat and beside a uniform choice.

    python benchmarks/decomposition.py [--short] [--json FILE]

SmolLM2-135M. Every pair has equal code bits (plain) or equal bytes (uniform); ratio is perplexity ours / peer, from the
mean difference of log-likelihood per token; spread is its standard error over windows.
"""

from collections.abc import Iterator
from typing import Any

import rows
from perplexity import SUBJECTS, base_losses, compare, heldout, losses, same_bytes, setting, settings
from rows import Row

SUBJECT = SUBJECTS["smollm2"]


def measure(short: bool) -> Iterator[Row]:
    """3-bit codes with and without the low-rank part; allocated against two uniform choices at their bytes."""
    windows = heldout(SUBJECT, 4 if short else 12)

    def uniform(bits: int, rank: int) -> tuple[list[float], dict[str, Any]]:
        one = setting("decompose", grids=["nf"], bits=[bits], block_sizes=[64], ranks=[rank], budget="32bits")
        return losses(settings(SUBJECT, *one), windows)

    low, low_body = uniform(3, 16)
    plain, _ = uniform(3, 0)
    yield compare("NF3 block 64 + rank 16 / plain NF3 block 64", low, plain, 1.0)
    nf4, nf4_body = uniform(4, 0)
    for name, peer, size in (("NF3 rank 16", low, low_body), ("plain NF4", nf4, nf4_body)):
        ours, body = losses(settings(SUBJECT, *same_bytes(size)), windows)
        bits = body["bits_per_weight"]
        yield compare(f"allocated / uniform {name}, equal bytes ({bits:.3f} bits)", ours, peer, 1.0)
    yield compare("plain NF4 block 64 / unquantised", nf4, base_losses(settings(SUBJECT), windows), None)


if __name__ == "__main__":
    rows.run("Perplexity of decomposed models beside plain and uniform quantisation.", measure)

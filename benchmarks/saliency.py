"""What a low-rank adapter sees of a weight's true gradient, on SmolLM2-135M, from either side.

    python benchmarks/saliency.py [--short] [--json FILE] [--rows 4] [--rank 8] [--redraws 8]

The truth of a layer is the first-order score |G o W| with the gradient G of every weight, from one batch of text
(windows of 256 tokens), one layer's gradients at a time. LoRAPrune's estimate has the gradients of an adapter instead.
With a product B A of zero they are s G A^T and s B^T G, to which tests/unit/prune/test_lora_guided.py holds autograd;
here they are made from G. Three adapters: as published, A random and B zero; side-matched, A zero and B random where
groups are columns (o, down); and several of these drawn anew, their estimates averaged with their signs.

A row is Spearman's rank correlation with the truth, the mean over layers (every layer; with --short the first, the
middle and the last) and three draws: ours beside the peer's, which is the published adapter. Ratio is ours / peer, none
where the peer's is not positive; spread is the standard deviation over layers of the difference ours - peer. Channels
are single rows or columns of a weight. Scores are of groups, over all weights of a group, each of unit norm; a layer of
this model has 1,536 ffn groups but three kv groups, so a single correlation of the latter means little.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import rows
import torch
from perplexity import SUBJECTS, context, settings
from rows import Row
from scipy.stats import spearmanr
from torch import Tensor

from prune.groups import PRUNED_AXIS, LayerShape, pruned_dim
from prune.lora_guided import Adapter, averaged, guided_sums, side_matched
from prune.members import MemberScores, fold
from prune.taylor import taylor_sums
from qlora_pipe import datasets
from qlora_pipe.architectures import MODULE
from qlora_pipe.compile import compile_model
from qlora_pipe.events import Reporter
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.sequences import collate
from qlora_pipe.hf.tokens import load_tokenizer
from qlora_pipe.hf.tokens import rows as token_rows
from qlora_pipe.stages.models import base_layers

LENGTH, DRAWS, SCALING = 256, 3, 2.0
PUBLISHED, MATCHED, REDRAWN, REDRAWN_ROWS = "published", "side-matched", "side-matched, redrawn", "published, redrawn"
TRUTH = "truth"

Layer = dict[str, tuple[Tensor, Tensor]]
"""Role to weight and gradient [out, in]."""

Correlations = dict[str, dict[str, float]]
"""What is ranked to the correlation of each estimate."""


def gradients(stream: LayerStream, batch: dict[str, Tensor]) -> Iterator[tuple[int, Layer]]:
    """(number, layer) with true gradients of the summed loss, from the last layer to the first."""
    start = stream.start(batch)
    hidden = [start.hidden]
    for index in range(len(stream)):
        with stream.layer(index) as layer, torch.no_grad():
            hidden.append(layer(hidden[-1], **start.arguments[index]))
    last = hidden.pop().requires_grad_()
    stream.loss(last, batch).backward()
    gradient = last.grad
    for index in reversed(range(len(stream))):
        with stream.layer(index) as layer:
            weights = {role: layer.get_submodule(path).weight.requires_grad_() for role, path in MODULE.items()}
            entering = hidden.pop().requires_grad_()
            layer(entering, **start.arguments[index]).backward(gradient)
            gradient = entering.grad
            yield index, {role: (weight.detach(), weight.grad) for role, weight in weights.items()}


def adapter(gradient: Tensor, a: Tensor, b: Tensor) -> Adapter:
    """The adapter that training would find at B A = 0."""
    return Adapter(a, b, SCALING * b.T @ gradient, SCALING * gradient @ a.T, SCALING)


def estimates(
    role: str, weight: Tensor, gradient: Tensor, shape: LayerShape, sizes: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Each estimate's sums over the channels of a weight; sizes: rank, and how many adapters are averaged."""
    rank, redraws = sizes

    def one_sided() -> Adapter:
        """A random and B zero, whatever the role."""
        a = torch.randn(rank, weight.shape[1], generator=generator) * rank**-0.5
        return adapter(gradient, a, torch.zeros(weight.shape[0], rank))

    published = [one_sided() for _ in range(redraws)]
    matched = published
    if PRUNED_AXIS[role] == "columns":
        matched = [adapter(gradient, *side_matched(role, shape, rank, generator)) for _ in range(redraws)]
    made = {PUBLISHED: published[:1], MATCHED: matched[:1], REDRAWN: matched, REDRAWN_ROWS: published}
    return {name: guided_sums(averaged(drawn), weight, pruned_dim(role)) for name, drawn in made.items()}


def compared(layer: Layer, shape: LayerShape, sizes: tuple[int, int], generator: torch.Generator) -> Correlations:
    """What each estimate of one layer correlates with the truth, by what is ranked: one draw."""
    found: Correlations = defaultdict(dict)
    members = defaultdict(lambda: MemberScores(shape))
    for role, (weight, gradient) in layer.items():
        truth = taylor_sums(weight, gradient, pruned_dim(role))
        made = estimates(role, weight, gradient, shape, sizes, generator)
        for name, sums in made.items():
            found[f"{role} channels"][name] = correlation(sums, truth)
        for name, sums in (made | {TRUTH: truth}).items():
            members[name].add(role, fold(role, sums, shape))
    scores = {name: gathered.scores() for name, gathered in members.items()}
    for kind in ("kv", "ffn"):
        for name in made:
            found[f"{kind} score"][name] = correlation(scores[name][kind], scores[TRUTH][kind])
    return found


def correlation(found: Tensor, truth: Tensor) -> float:
    return float(spearmanr(found.numpy(), truth.numpy()).statistic)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """Rows by what is ranked: the channels of every role, then scores of groups."""
    config = settings(SUBJECTS["smollm2"])
    artifacts = compile_model(config, Reporter(), until="source")
    data = config.data.calibration
    tokenizer = load_tokenizer((Path(str(config.run)) / "base").resolve())
    records = datasets.load(data, "train", 0)
    text = token_rows(tokenizer, records, length=LENGTH, count=arguments.rows, name=data.source)
    stream = base_layers(context(config, artifacts))
    count, shapes = len(stream), stream.architecture.layers
    chosen = {0, count // 2, count - 1} if arguments.short else set(range(count))
    generator = torch.Generator().manual_seed(0)
    layers: list[Correlations] = []
    for index, layer in gradients(stream, collate(text)):
        if index in chosen:
            sizes = arguments.rank, arguments.redraws
            layers.append(mean_of([compared(layer, shapes[index], sizes, generator) for _ in range(DRAWS)]))
    for ranked in layers[0]:
        yield from summary(ranked, [layer[ranked] for layer in layers], arguments)


def mean_of(draws: Sequence[Correlations]) -> Correlations:
    return {
        ranked: {name: statistics.fmean(draw[ranked][name] for draw in draws) for name in by_name}
        for ranked, by_name in draws[0].items()
    }


def summary(ranked: str, layers: Sequence[dict[str, float]], arguments: argparse.Namespace) -> Iterator[Row]:
    """Estimates that differ from the published one, beside it; the bars are on what is to be better."""
    peers = [layer[PUBLISHED] for layer in layers]
    peer = statistics.fmean(peers)
    names = (REDRAWN,) if PRUNED_AXIS.get(ranked.split()[0]) == "rows" else (MATCHED, REDRAWN, REDRAWN_ROWS)
    for name in names:
        ours = [layer[name] for layer in layers]
        spread = statistics.stdev(a - b for a, b in zip(ours, peers, strict=True))
        mean = statistics.fmean(ours)
        drawn = "" if name == MATCHED else f" x {arguments.redraws}"
        title = f"{ranked}, rank {arguments.rank}: {name}{drawn} / {PUBLISHED}"
        bar, holds = ("-", None) if name == REDRAWN_ROWS else ("> peer", mean > peer)
        yield Row(title, mean, peer, mean / peer if peer > 0 else None, bar, holds, spread)


if __name__ == "__main__":
    options = rows.parser("What a low-rank adapter sees of a weight's true gradient, from either side.")
    options.add_argument("--rows", type=int, default=4, metavar="N", help="windows of text")
    options.add_argument("--rank", type=int, default=8, metavar="N", help="rank of every adapter")
    options.add_argument("--redraws", type=int, default=8, metavar="N", help="adapters that are averaged")
    given = options.parse_args()
    rows.show(measure(given), given.json)

"""The widths that pruning leaves, as far as shapes alone tell, and what the true reduction asks for; needs no torch."""

import math
from collections.abc import Iterator
from dataclasses import replace

from prune.counting import counts_without, exact_ratio, group_parameters, kept_count, loram_kept, offered_counts
from prune.exceptions import RatioError
from prune.groups import PRUNED_AXIS, LayerShape
from qlora_pipe.architectures import Architecture
from qlora_pipe.config import Prune
from qlora_pipe.errors import ConfigError

KINDS = ("kv", "ffn")
"""What a layer's groups are made of: KV heads with their query heads, and FFN channels."""

_DIGITS = 10**6


def small_architecture(architecture: Architecture, settings: Prune) -> Architecture:
    """The widths that pruning will leave: exact where they are uniform, an even guess where they are allocated.

    Raises ConfigError if nothing would stay, or if `ratio` asks for more than the layers that may be pruned can give.
    """
    free = prunable(architecture, settings)
    if not free and settings.removes:
        raise ConfigError(
            f"prune.protect_first {settings.protect_first} and prune.protect_last {settings.protect_last} cover all "
            f"{len(architecture.layers)} layers; protect fewer, or set the ratios to 0"
        )
    counts = _by_ratios(architecture, settings) if settings.ratio is None else _by_reduction(architecture, settings)
    layers = [
        narrowed(shape, *counts[number]) if number in free else shape
        for number, shape in enumerate(architecture.layers)
    ]
    return architecture.with_layers(layers)


def narrowed(shape: LayerShape, kv_heads: int, ffn: int) -> LayerShape:
    """A layer with so many KV groups and FFN channels left."""
    return replace(shape, kv_heads=kv_heads, heads=kv_heads * shape.queries_per_kv, ffn=ffn)


def prunable(architecture: Architecture, settings: Prune) -> range:
    """Numbers of the layers that are not protected."""
    return range(settings.protect_first, len(architecture.layers) - settings.protect_last)


def offered(shape: LayerShape, kind: str, settings: Prune) -> tuple[int, ...]:
    """Counts of groups that may stay of a layer: whole KV groups, multiples of `align` FFN channels, or all; and what
    LoRAM would leave, where it is asked."""
    counts = offered_counts(shape.group_count(kind), 1 if kind == "kv" else settings.align)
    if settings.rounding != "loram":
        return counts
    return tuple(sorted({*counts, _by_loram(shape, settings)[KINDS.index(kind)]}))


def group_sizes(architecture: Architecture, layer: int) -> dict[str, int]:
    """Parameters that leave a layer with one group of each kind."""
    return {kind: group_parameters(kind, architecture.layers[layer], architecture.biased) for kind in KINDS}


def reduction(full: int, small: int) -> float:
    """Share of so many parameters of the transformer blocks that has gone: the true reduction."""
    return (full - small) / full


def parameters_to_go(architecture: Architecture, settings: Prune) -> int:
    """Parameters of the blocks that have to go at least, so that the true reduction is never below `ratio`."""
    wanted = math.ceil(exact_ratio(settings.ratio or 0.0) * architecture.block_parameters())
    return wanted + bias_parameters(architecture, settings)


def bias_parameters(architecture: Architecture, settings: Prune) -> int:
    """Parameters that pruning adds: biases of the linear maps that have none yet."""
    return with_biases(architecture, settings).block_parameters() - architecture.block_parameters()


def with_biases(architecture: Architecture, settings: Prune) -> Architecture:
    """The same with biases on o and down, if what goes leaves its mean there."""
    readers = {role for role, axis in PRUNED_AXIS.items() if axis == "columns"}
    return replace(architecture, biased=architecture.biased | readers) if settings.leaves_bias else architecture


def _by_ratios(architecture: Architecture, settings: Prune) -> dict[int, tuple[int, int]]:
    if settings.rounding == "loram":
        return {number: _by_loram(architecture.layers[number], settings) for number in prunable(architecture, settings)}
    return {
        number: (
            _kept("kv_ratio", architecture.layers[number].kv_heads, settings.kv_ratio, 1),
            _kept("ffn_ratio", architecture.layers[number].ffn, settings.ffn_ratio, settings.align),
        )
        for number in prunable(architecture, settings)
    }


def _by_loram(shape: LayerShape, settings: Prune) -> tuple[int, int]:
    try:
        kept = loram_kept(shape, settings.ffn_ratio)
    except RatioError as error:
        raise ConfigError(f"prune: {error}") from error
    return kept.kv_heads, kept.ffn


def _by_reduction(architecture: Architecture, settings: Prune) -> dict[int, tuple[int, int]]:
    """The same share of every layer's groups, so that the reduction of all blocks together is as asked."""
    wanted = parameters_to_go(architecture, settings)
    _check_reachable(architecture, settings, wanted)
    whole = {number: size for number, size, _ in _sizes(architecture, settings)}
    total, biased = sum(whole.values()), architecture.biased
    found = {}
    for number, size in whole.items():
        share = -(-wanted * size // total)
        try:
            found[number] = counts_without(architecture.layers[number], share, settings.align, biased)
        except RatioError as error:
            raise ConfigError(f"prune.ratio {settings.ratio}: layer {number}: {error}; lower it") from error
    return found


def _check_reachable(architecture: Architecture, settings: Prune, wanted: int) -> None:
    """Raise ConfigError if one group of each kind, and whole protected layers, are more than may stay."""
    most = sum(size - least for _, size, least in _sizes(architecture, settings))
    if wanted <= most:
        return
    total, added = architecture.block_parameters(), bias_parameters(architecture, settings)
    largest = math.floor(_DIGITS * (most - added) / total) / _DIGITS
    groups = sum(size for _, size, _ in _sizes(architecture, settings))
    if wanted > groups and (settings.protect_first or settings.protect_last):
        raise ConfigError(
            f"prune.ratio {settings.ratio} lets {total + added - wanted} of {total} parameters stay, but protected "
            f"layers and norms take {total - groups} of them; protect fewer layers (prune.protect_first, "
            f"prune.protect_last), or lower the ratio: the largest that works is {largest}"
        )
    raise ConfigError(
        f"prune.ratio {settings.ratio} would empty layers: one KV group and {settings.align} FFN channels "
        f"(prune.align) stay of each; the largest that works is {largest}"
    )


def _sizes(architecture: Architecture, settings: Prune) -> Iterator[tuple[int, int, int]]:
    """(layer, parameters of its groups, the least of them that stay) of every layer that may be pruned."""
    for number in prunable(architecture, settings):
        shape, sizes = architecture.layers[number], group_sizes(architecture, number)
        whole = sum(sizes[kind] * shape.group_count(kind) for kind in KINDS)
        least = sum(sizes[kind] * offered(shape, kind, settings)[0] for kind in KINDS)
        yield number, whole, least


def _kept(setting: str, total: int, ratio: float, align: int) -> int:
    try:
        return kept_count(total, ratio, align)
    except RatioError as error:
        raise ConfigError(f"prune.{setting}: {error}") from error

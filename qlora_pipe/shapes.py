"""What can be refused from shapes alone; needs no torch."""

from collections.abc import Iterator
from itertools import zip_longest

from prune.groups import shape_of
from qlora_pipe.architectures import Architecture
from qlora_pipe.config import Config
from qlora_pipe.config_training import Taught
from qlora_pipe.errors import ConfigError
from qlora_pipe.integer_formats import refusal
from qlora_pipe.known import allowed
from qlora_pipe.rules import bits_of
from qlora_pipe.sparsity import check_divides
from qlora_pipe.widths import narrowed, offered, prunable, small_architecture, with_biases


def check_shapes(architecture: Architecture, config: Config) -> None:
    """Everything that can be refused from shapes alone; raises ConfigError."""
    allowed(architecture, config)
    check_divides(architecture, config.prune.sparsity)
    small = small_architecture(architecture, config.prune)
    taught: dict[str, tuple[bool, Taught]] = {
        "align": (config.align.enabled, config.align),
        "train": (True, config.train),
        "compact": (config.compact.enabled, config.compact),
    }
    for section, (used, settings) in taught.items():
        if used and settings.asks and settings.top > architecture.vocab:
            raise ConfigError(f"{section}.top {settings.top} is more than the {architecture.vocab} tokens of the model")
    if not config.compact.enabled:
        return
    names = [name for _, _, name in architecture.linears()]
    bits = bits_of(names, config.compact.bits, config.compact.rules)
    for pruned in (small, *_every_width(architecture, config)):
        for layer, role, _ in pruned.linears():
            columns = shape_of(role, pruned.layers[layer])[1]
            if columns % config.compact.group_size:
                raise ConfigError(
                    f"compact.group_size {config.compact.group_size} does not divide the {columns} inputs of the "
                    f"pruned {role} projection; choose a divisor, prune to a multiple of it (prune.align, under "
                    "prune.rounding aligned), or set compact.enabled to false"
                )
    for kind in config.export.integer or ():
        reason = refusal(kind, architecture, with_biases(small, config.prune), config, bits)
        if reason:
            raise ConfigError(f"export.integer: {kind} cannot hold the integer model: {reason}")


def _every_width(architecture: Architecture, config: Config) -> Iterator[Architecture]:
    """Where scores decide on widths: models that have all that may be left of a layer."""
    if config.prune.widths == "uniform" or not config.prune.removes:
        return
    for shape in {architecture.layers[layer] for layer in prunable(architecture, config.prune)}:
        for kv_heads, ffn in zip_longest(*(offered(shape, kind, config.prune) for kind in ("kv", "ffn"))):
            yield architecture.with_layers([narrowed(shape, kv_heads or shape.kv_heads, ffn or shape.ffn)])

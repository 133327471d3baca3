"""How many entries go where no shape changes, from shapes alone, and what selection.json says of it; needs no torch."""

import math
from collections.abc import Mapping
from typing import Any

from prune.counting import masked_count
from qlora_pipe.architectures import Architecture
from qlora_pipe.config_sparsity import Sparsity
from qlora_pipe.errors import ConfigError


def check_divides(architecture: Architecture, settings: Sparsity) -> None:
    """Raise ConfigError unless the inputs of every linear map split into the pattern's groups."""
    if settings.group is None:
        return
    for name, (_, columns) in architecture.linear_shapes().items():
        if columns % settings.group:
            raise ConfigError(
                f"prune.sparsity.pattern {settings.pattern} needs inputs in groups of {settings.group}, and {name} has "
                f"{columns}; choose another pattern"
            )


def nonzero_parameters(architecture: Architecture, settings: Sparsity) -> int:
    """Parameters of the model that are not made zero, as LoRAM counts them (arXiv 2502.13533): all that is not a linear
    map of a block, and the entries that stay of these. No layer is protected."""
    total = sum(math.prod(shape) for shape in architecture.tensors().values())
    if not settings.enabled:
        return total
    shapes = architecture.linear_shapes().values()
    return total - sum(masked_count(rows, columns, settings.ratio) for rows, columns in shapes)


def record(
    zeros: Mapping[str, int], architecture: Architecture, settings: Sparsity, model: str, index_map: str
) -> dict[str, Any]:
    """The body of selection.json: how many entries of every linear map are masked, and what is left of the model.

    `zeros` were counted, by name. Codes that rounding makes zero are not among them.
    """
    weights = {name: rows * columns for name, (rows, columns) in architecture.linear_shapes().items()}
    total = sum(math.prod(shape) for shape in architecture.tensors().values())
    return {
        "model": model,
        "index_map": index_map,
        "sparsity": settings.model_dump(mode="json"),
        "parameters": {"model": total, "nonzero": total - sum(zeros.values())},
        "true_sparsity": sum(zeros.values()) / sum(weights.values()),
        "matrices": {
            name: {"weights": weights[name], "zeros": count, "sparsity": count / weights[name]}
            for name, count in zeros.items()
        },
    }


def rows(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) of selection.json for people."""
    settings, parameters = body["sparsity"], body["parameters"]
    shares = [row["sparsity"] for row in body["matrices"].values()]
    low, high = (f"{100 * share:.2f}" for share in (min(shares), max(shares)))
    spread = "every matrix alike" if low == high else f"{low} to {high} % of a matrix"
    return [
        ("pattern", f"{settings['pattern']}, by {settings['by']}"),
        ("zeros in Q", f"{100 * body['true_sparsity']:.2f} % of the blocks' linear maps, {spread}"),
        ("nonzero parameters", f"{parameters['nonzero']:,} of {parameters['model']:,}; the codes stay dense"),
    ]

"""The model that is trained in a stated memory: fewer bits, and then less structure; needs no torch."""

import math
from bisect import bisect_left
from collections.abc import Mapping

from qlora_pipe import layouts
from qlora_pipe.architectures import Architecture
from qlora_pipe.budget import smallest_allocation
from qlora_pipe.config import Config
from qlora_pipe.errors import BudgetError, ConfigError, PlanError
from qlora_pipe.known import Known, estimate_allocation, linear_budget
from qlora_pipe.memory import peak_bytes
from qlora_pipe.units import format_bytes, parse_bytes
from qlora_pipe.widths import reduction, small_architecture

LEAST_BITS = 2.75
"""Of a weight, everything counted, before structure goes: `benchmarks/transfer.py`."""

_BITS = 100
"""Steps in a bit."""
_GONE = 1000
"""Steps in the share of the blocks that goes."""
_NOMINAL = {"kv_ratio": 0.0, "ffn_ratio": 0.0}
"""What a ratio takes the place of."""

STAGES = ("align", "train")
"""What is training."""


def settled(config: Config, architecture: Architecture, dtypes: Mapping[str, str]) -> Config:
    """The same with a decompose.budget so low, and then a prune.ratio so high, that training fits `train_budget`.

    That is the plan's peak of align and train, on the device, or on the host if that is the CPU, where the whole of
    decompose.budget is spent, evenly on what is kept. As many bits as fit are kept, down to LEAST_BITS a weight or what
    the configurations offered take at least; only then does structure go, as little as does. What fits already, and
    what is found, stays as it is. Raises BudgetError, which says what training takes at the least, if nothing fits.
    """
    if config.train_budget is None:
        return config
    limit = parse_bytes(config.train_budget)

    def peak(tried: Config) -> int:
        return _training_bytes(tried, architecture, dtypes)

    if peak(config) <= limit:
        return config
    weights = architecture.linear_weights()
    given = 8 * linear_budget(architecture, dtypes, config) / weights
    smallest = 8 * sum(size for _, size in smallest_allocation(architecture, config).values()) / weights
    bits = [
        _with_bits(config, count)
        for count in range(math.ceil(_BITS * max(smallest, LEAST_BITS)), math.ceil(_BITS * given))
    ]
    fitting = bisect_left(bits, True, key=lambda tried: peak(tried) > limit)
    if fitting:
        return bits[fitting - 1]
    lowest = bits[0] if bits else config
    pruned = _pruned(lowest, architecture)
    found = bisect_left(pruned, True, key=lambda tried: peak(tried) <= limit)
    if found < len(pruned):
        return pruned[found]
    least = pruned[-1] if pruned else lowest
    fixed = "" if pruned else " (prune.sparsity and prune.rounding: loram keep the structure as it is)"
    raise BudgetError(
        f"train_budget {config.train_budget}: training takes {format_bytes(peak(least))} at the least, with "
        f"{told(least)}{fixed}: raise it, or take a smaller batch_size, length or rank in train and align, "
        "activation_checkpointing, or fewer protected layers"
    )


def check_training(config: Config, peaks: Mapping[str, int]) -> None:
    """Raise PlanError if training as it is known in the end, `peaks` by stage, is above `train_budget`: bits may have
    gone to what is kept."""
    if config.train_budget is None:
        return
    found = max(peaks[stage] for stage in STAGES)
    if found > parse_bytes(config.train_budget):
        raise PlanError(
            f"training takes {format_bytes(found)}, train_budget allows {config.train_budget}: the matrices that are "
            f"kept have more bits than others; lower decompose.budget below {config.decompose.budget} or raise "
            "train_budget"
        )


def told(config: Config) -> str:
    """What was found, in words."""
    gone = f"prune.ratio {config.prune.ratio:g}" if config.prune.ratio else "no prune.ratio"
    return f"decompose.budget {config.decompose.budget} and {gone}"


def _with_bits(config: Config, count: int) -> Config:
    decompose = config.decompose.model_copy(update={"budget": f"{count / _BITS:g}bits"})
    return config.model_copy(update={"decompose": decompose})


def _pruned(config: Config, architecture: Architecture) -> list[Config]:
    """Ever more of the structure gone, beyond what goes already, as far as something stays of every layer."""
    if config.prune.sparsity.enabled or config.prune.rounding == "loram":
        return []
    whole = architecture.block_parameters()
    now = reduction(whole, small_architecture(architecture, config.prune).block_parameters())
    found = [
        config.model_copy(update={"prune": config.prune.model_copy(update=_NOMINAL | {"ratio": gone / _GONE})})
        for gone in range(math.floor(_GONE * now) + 1, _GONE)
    ]

    def empties(tried: Config) -> bool:
        try:
            small_architecture(architecture, tried.prune)
        except ConfigError:
            return True
        return False

    return found[: bisect_left(found, True, key=empties)]


def _training_bytes(config: Config, architecture: Architecture, dtypes: Mapping[str, str]) -> int:
    """The larger peak of align and train, with the bytes that the estimated allocation leaves of the budget."""
    allocation = estimate_allocation(architecture, dtypes, config)
    known = Known(config, architecture, dtypes, allocation, allocation_is_final=False)
    unspent = linear_budget(architecture, dtypes, config) - layouts.linear_bytes(known.decomposed(), architecture)
    kept = known.small.linear_weights() / architecture.linear_weights()
    place = 0 if config.device == "cpu" else 1
    return max(peak_bytes(stage, known)[place] for stage in STAGES) + math.ceil(max(0, unspent) * kept)

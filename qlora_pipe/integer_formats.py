"""Which formats of other tools can hold the integer model, and why the others cannot; needs no torch."""

from collections.abc import Mapping

from qlora_pipe.architectures import Architecture
from qlora_pipe.config import Config
from qlora_pipe.config_export import IntegerFormat
from qlora_pipe.gguf_layout import FAMILIES
from quant.storage import GGUF_BLOCK, GPTQ_MULTIPLE

DEFAULT: IntegerFormat = "compressed-tensors"

_GPTQ_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
"""Groups that some kernel of GPTQModel 7.6 has for every width."""

_QWEN3_HEADS = 128
"""Width of a head that transformers takes for granted."""


def chosen(
    full: Architecture, small: Architecture, config: Config, bits: Mapping[str, int]
) -> dict[IntegerFormat, str | None]:
    """The formats that were asked for, or the default: None for one that is written, else why it is left out.

    Only the default is ever left out: what is asked for and cannot be was refused with the plan. `full` and `small` are
    the model before and after pruning, `bits` the code width of every linear map.
    """
    if not config.compact.enabled:
        return {}
    if config.export.integer is not None:
        return dict.fromkeys(config.export.integer)
    return {DEFAULT: refusal(DEFAULT, full, small, config, bits)}


def refusal(
    name: IntegerFormat, full: Architecture, small: Architecture, config: Config, bits: Mapping[str, int]
) -> str | None:
    """Why a format cannot hold the integer model, and the least change with which it could; None if it can."""
    if config.compact.method == "qat-lora":
        return "it has no place for the adapter that qat-lora leaves beside the integers: set compact.method to l4q"
    odd = sorted(set(bits.values()) - {4, 8}) if name == "gguf" else []
    if odd:
        return (
            f"it has no matrices of {odd[0]} bits whose steps are free, only of 4 and 8: set compact.bits and the "
            f"rules of compact to 4 or 8, or take {DEFAULT}"
        )
    if config.compact.method == "qa-lora" and (name != "gguf" or 8 in bits.values()):
        return "code 0 stands for a number that qa-lora trains, here only for 0: set compact.method to l4q"
    for width in sorted(set(bits.values())):
        offset = config.compact.offset_at(width)
        if offset != "zero" and (name, width) != ("gguf", 4):
            what = "half a step" if offset == "half" else "a trained number"
            return f"code 0 of {width} bits stands for {what}, here only for 0: set compact.offset to zero"
    prune = config.prune
    if len(set(small.layers)) > 1 or (prune.widths == "allocated" and prune.removes):
        return (
            "the layers of the small model may differ in width, here they cannot: set prune.widths to uniform and "
            "prune.protect_first and prune.protect_last to 0"
        )
    if small.biased != full.biased:
        return f"a {full.model_type} model has no place for the biases that pruning adds: set prune.bias to false"
    if name == "gguf":
        return _gguf_refusal(small, config)
    return None if name == "compressed-tensors" else _gptq_refusal(small, config)


def _gptq_refusal(small: Architecture, config: Config) -> str | None:
    group = config.compact.group_size
    if group not in _GPTQ_GROUPS:
        known = ", ".join(map(str, _GPTQ_GROUPS))
        return f"its readers know groups of {known}, not of {group}: set compact.group_size to one of these"
    for name, sides in small.linear_shapes().items():
        if any(side % GPTQ_MULTIPLE for side in sides):
            return (
                f"{name} is {list(sides)}, and both sides must be multiples of {GPTQ_MULTIPLE}: prune to multiples "
                f"(prune.align, whole heads), or take {DEFAULT}"
            )
    return None


def _gguf_refusal(small: Architecture, config: Config) -> str | None:
    group, shape, kind = config.compact.group_size, small.layers[0], small.model_type
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        return f"what readers make of a {kind} model is not known here, of {known} it is: take {DEFAULT}"
    if small.biased != frozenset(small.family.bias_roles):
        return f"its readers leave out the biases of this {kind} model: take {DEFAULT}"
    if kind == "qwen2" and shape.heads * shape.head_dim != shape.hidden:
        whole = "prune.kv_ratio to 0" if config.prune.ratio is None else "prune.ffn_ratio in place of prune.ratio"
        return (
            f"its readers take heads of a {kind} model for {shape.hidden}/{shape.heads} wide: set {whole}, or take "
            f"{DEFAULT}"
        )
    if kind == "qwen3" and shape.head_dim != _QWEN3_HEADS:
        return f"its readers take heads of a {kind} model for {_QWEN3_HEADS} wide: take {DEFAULT}"
    if group % GGUF_BLOCK:
        return f"its blocks are of {GGUF_BLOCK} weights: set compact.group_size to a multiple of that, not to {group}"
    return None

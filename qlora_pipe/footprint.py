"""What a model and a pass through it take, in bytes, from shapes alone: the parts that `memory` sums up."""

import math

from qlora_pipe.architectures import EMBEDDING, Architecture
from qlora_pipe.config_training import Optimisation
from qlora_pipe.known import Known

FLOAT = 4

HEAD_ROWS = 256
"""Positions whose logits exist at one time."""

ALLOCATOR = 1.9
"""What the host's allocator holds for each byte that autograd keeps: freed blocks of other sizes in between.

Measured with glibc on training and calibration passes (1.5 to 2.2). MALLOC_MMAP_THRESHOLD_=262144 in the environment
brings it near 1, and makes a training step about 1.6 times as long.
"""


def dense_bytes(known: Known, architecture: Architecture) -> int:
    """A model in the compute dtype."""
    return number_bytes(known) * parameter_count(architecture)


def number_bytes(known: Known) -> int:
    """Bytes of a number in the compute dtype."""
    return 2 if known.config.dtype == "bfloat16" else FLOAT


def parameter_count(architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in architecture.tensors().values())


def batch_bytes(known: Known, model: Architecture, rank: int, settings: Optimisation) -> int:
    """Activations and head of one training batch of adapters of that rank, every row at its longest."""
    adapted = sum(2 * shape.hidden + shape.ffn + 7 * rank for shape in model.layers)
    return pass_bytes(known, model, settings, adapted)


def pass_bytes(known: Known, model: Architecture, settings: Optimisation, adapted: int) -> int:
    """Activations of one forward and backward pass; `adapted`: numbers kept for trained maps, per token."""
    tokens = settings.batch_size * settings.length
    if settings.activation_checkpointing:
        per_layer = kept_bytes(model, tokens, known) // len(model.layers)
        return FLOAT * tokens * model.hidden * len(model.layers) + 2 * per_layer + head_bytes(known, tokens)
    return kept_bytes(model, tokens, known) + held_bytes(FLOAT * tokens * adapted, known) + head_bytes(known, tokens)


def kept_bytes(architecture: Architecture, tokens: int, known: Known) -> int:
    """What autograd keeps of a frozen decoder: per token and layer 3 FFN widths, 2 residuals, queries, keys, values,
    the attention's output and its normaliser. Counted with saved-tensor hooks on Llama.
    """
    per_token = sum(
        3 * shape.ffn + 2 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.heads + 2
        for shape in architecture.layers
    )
    return held_bytes(FLOAT * tokens * per_token, known)


def rebuilt_bytes(model: int, known: Known) -> int:
    """A model built where others were before it: what the host's allocator keeps between them, measured."""
    return round(1.4 * model) if known.config.device == "cpu" else model


def held_bytes(kept: int, known: Known) -> int:
    return round(ALLOCATOR * kept) if known.config.device == "cpu" else kept


def passing_bytes(architecture: Architecture, tokens: int) -> int:
    """Activations alive inside one layer of a forward pass without gradients."""
    widest = max(4 * shape.ffn + 4 * shape.hidden for shape in architecture.layers)
    return FLOAT * tokens * widest


def head_bytes(known: Known, tokens: int) -> int:
    """Logits, their log-softmax and both gradients, for the positions that exist at one time."""
    return 4 * FLOAT * min(tokens, HEAD_ROWS) * known.architecture.vocab


def largest_tensor_bytes(architecture: Architecture) -> int:
    return FLOAT * math.prod(architecture.tensors()[f"{EMBEDDING}.weight"])


def largest_matrix_bytes(architecture: Architecture) -> int:
    return FLOAT * max(math.prod(shape) for shape in architecture.linear_shapes().values())

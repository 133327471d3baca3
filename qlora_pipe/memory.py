"""Peak memory of every stage, in bytes, from shapes alone.

Each figure is a sum of parts with a name: the libraries, weights that stay, what autograd keeps per token, the head.
`benchmarks/memory.py` and the report of every run put the figures beside measured ones.
"""

import math
from dataclasses import dataclass

from prune.groups import shape_of
from qlora_pipe import layouts
from qlora_pipe.architectures import EMBEDDING, Architecture
from qlora_pipe.config import Optimisation
from qlora_pipe.known import Known

RUNTIME_BYTES = 480 * 10**6
"""Resident memory of Python with torch and transformers loaded, before a model: measured with the constraints file."""

EVALUATION_TOKENS = 2048
"""Tokens in one forward pass of an evaluation."""

HEAD_ROWS = 256
"""Positions whose logits exist at one time."""

ALLOCATOR = 1.9
"""What the host's allocator holds for each byte that autograd keeps: freed blocks of other sizes in between.

Measured with glibc on training and calibration passes (1.5 to 2.2). MALLOC_MMAP_THRESHOLD_=262144 in the environment
brings it near 1, and makes a training step about 1.6 times as long.
"""

_FLOAT = 4
_TRAINED_COPIES = 4  # value, gradient, two moments of Adam
_MATRIX_COPIES = 10  # a decomposition's temporaries, in fp32 matrices
_STREAM_COPIES = 2  # a tensor as read, converted, and as written


@dataclass(frozen=True)
class _Work:
    """Bytes beside the libraries: on the device if there is one, and on the host in any case."""

    device: int
    host: int


def peak_bytes(stage: str, known: Known) -> tuple[int, int]:
    """(host, device) peak of a stage. On the CPU everything counts as host; the device's figure is then 0."""
    work = _work(stage, known)
    if known.config.device == "cpu":
        return RUNTIME_BYTES + max(work.host, work.device), 0
    return RUNTIME_BYTES + work.host, work.device


def _work(stage: str, known: Known) -> _Work:
    config, full, small = known.config, known.architecture, known.small
    stream = _STREAM_COPIES * _largest_tensor(full)
    matrix = _MATRIX_COPIES * _largest_matrix(full)
    adapter = layouts.tensor_bytes(known.adapter())
    full_adapter = layouts.tensor_bytes(known.full_adapter())
    if stage == "source":
        # The GGUF loader's model and the clean one that is saved exist together.
        return _Work(0, 2 * _FLOAT * _parameters(full) if known.converts else 0)
    if stage == "calibrate":
        length = config.calibrate.length
        return _Work(_dense(known, full) + _kept(full, length, known) + _head(known, length), stream)
    if stage in ("score", "decompose", "prune"):
        return _Work(0, matrix if stage == "score" else max(matrix, stream))
    if stage == "train":
        packed = layouts.tensor_bytes(known.pruned())
        return _Work(packed + _TRAINED_COPIES * adapter + _batch(known, config.train), stream)
    if stage == "compact" and config.compact.enabled:
        steps = sum(spec.nbytes for name, spec in known.integers().items() if name.endswith(".scale"))
        trained = layouts.tensor_bytes(known.compact_adapter()) + steps
        return _Work(_dense(known, small) + _TRAINED_COPIES * trained + _batch(known, config.compact), stream)
    if stage in ("recover", "evaluate"):
        passing = _passing(full, EVALUATION_TOKENS) + _head(known, EVALUATION_TOKENS)
        return _Work(_rebuilt(_dense(known, full), known) + full_adapter + passing, stream)
    return _Work(0, stream if stage == "export" else 0)


def _dense(known: Known, architecture: Architecture) -> int:
    """A model in the compute dtype."""
    width = 2 if known.config.dtype == "bfloat16" else _FLOAT
    return width * _parameters(architecture)


def _parameters(architecture: Architecture) -> int:
    return sum(math.prod(shape) for shape in architecture.tensors().values())


def _batch(known: Known, settings: Optimisation) -> int:
    """Activations and head of one training batch, every row at its longest."""
    tokens = settings.batch_size * settings.length
    small = known.small
    adapted = sum(2 * shape.hidden + shape.ffn + 7 * known.compact_rank() for shape in small.layers)
    if settings.activation_checkpointing:
        per_layer = _kept(small, tokens, known) // len(small.layers)
        return _FLOAT * tokens * small.hidden * len(small.layers) + 2 * per_layer + _head(known, tokens)
    return _kept(small, tokens, known) + _held(_FLOAT * tokens * adapted, known) + _head(known, tokens)


def _kept(architecture: Architecture, tokens: int, known: Known) -> int:
    """What autograd keeps of a frozen decoder: per token and layer 3 FFN widths, 2 residuals, queries, keys, values,
    the attention's output and its normaliser. Counted with saved-tensor hooks on Llama.
    """
    per_token = sum(
        3 * shape.ffn + 2 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + shape.heads + 2
        for shape in architecture.layers
    )
    return _held(_FLOAT * tokens * per_token, known)


def _rebuilt(model: int, known: Known) -> int:
    """A model built where others were before it: what the host's allocator keeps between them, measured."""
    return round(1.4 * model) if known.config.device == "cpu" else model


def _held(kept: int, known: Known) -> int:
    return round(ALLOCATOR * kept) if known.config.device == "cpu" else kept


def _passing(architecture: Architecture, tokens: int) -> int:
    """Activations alive inside one layer of a forward pass without gradients."""
    widest = max(4 * shape.ffn + 4 * shape.hidden for shape in architecture.layers)
    return _FLOAT * tokens * widest


def _head(known: Known, tokens: int) -> int:
    """Logits, their log-softmax and both gradients, for the positions that exist at one time."""
    return 4 * _FLOAT * min(tokens, HEAD_ROWS) * known.architecture.vocab


def _largest_tensor(architecture: Architecture) -> int:
    return _FLOAT * math.prod(architecture.tensors()[f"{EMBEDDING}.weight"])


def _largest_matrix(architecture: Architecture) -> int:
    return _FLOAT * max(
        math.prod(shape_of(role, architecture.layers[layer])) for layer, role, _ in architecture.linears()
    )

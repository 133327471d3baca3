"""Peak memory of every stage, in bytes, from shapes alone.

Each figure is a sum of parts with a name: the libraries, weights that stay, what autograd keeps per token, the head.
`benchmarks/memory.py` and the report of every run put the figures beside measured ones.
"""

import math
from dataclasses import dataclass

from prune.groups import PRUNED_AXIS, shape_of
from qlora_pipe import layouts
from qlora_pipe.architectures import SITES
from qlora_pipe.config_training import Blocks, Optimisation, Taught
from qlora_pipe.footprint import (
    FLOAT,
    batch_bytes,
    dense_bytes,
    head_bytes,
    held_bytes,
    kept_bytes,
    largest_matrix_bytes,
    largest_tensor_bytes,
    number_bytes,
    parameter_count,
    pass_bytes,
    passing_bytes,
    rebuilt_bytes,
)
from qlora_pipe.known import Known
from quant.storage import Choice, PackedShape

RUNTIME_BYTES = 480 * 10**6
"""Resident memory of Python with torch and transformers loaded, before a model: measured with the constraints file."""

EVALUATION_TOKENS = 2048
"""Tokens in one forward pass of an evaluation."""

CALIBRATION_TOKENS = 2048
"""Tokens that go through a layer together in a calibration sweep; one row, if it is longer."""

BOUNDARY_BYTES = 4 * 10**9
"""Disk for the hidden states that the gradient sweep keeps at every layer of a group of batches."""

_SECTIONS = ("train", "align", "compact", "refine")
_TRAINED_COPIES = 4  # value, gradient, two moments of Adam
_SAVED_COPIES = 3  # the same without the gradient
_CHECKPOINTS = 3  # two are kept while the next is written
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


def scratch_bytes(stage: str, known: Known) -> int:
    """Disk for hidden states between layers, or after that for checkpoints, at most, which is free again when the stage
    is done."""
    config, full = known.config, known.architecture
    per_token = number_bytes(known) * full.hidden
    if stage == "calibrate":
        tokens, deep = config.calibrate.sequences * config.calibrate.length, per_token * (len(full.layers) + 1)
        together = min(tokens, max(CALIBRATION_TOKENS, config.calibrate.length))
        return max(min(deep * tokens, max(BOUNDARY_BYTES, deep * together)), per_token * tokens)
    settings = _optimisation(stage, known)
    if settings is None:
        return 0
    saved = min(_CHECKPOINTS, math.ceil(settings.steps / settings.save_steps))
    found = saved * _SAVED_COPIES * _trained(stage, known)
    if isinstance(settings, Taught) and settings.asks:
        found = max(found, per_token * _tokens(settings))
    if isinstance(settings, Blocks):
        found = max(found, 2 * per_token * settings.block_rows * settings.length)
    return found


def _optimisation(stage: str, known: Known) -> Optimisation | None:
    """What a stage trains by; None for one that trains nothing."""
    config = known.config
    if stage == "select":
        return config.guide if config.prune.method == "lora" else None
    settings: Optimisation | None = {name: getattr(config, name) for name in _SECTIONS}.get(stage)
    return settings if getattr(settings, "enabled", True) else None


def _trained(stage: str, known: Known) -> int:
    """fp32 bytes of what a stage trains."""
    config = known.config
    if stage == "select":
        return layouts.tensor_bytes(layouts.adapter(known.architecture, config.align.rank))
    if stage == "align":
        return layouts.tensor_bytes(known.compensation())
    if stage == "train":
        # What L1 L2 moves by has twice the rank that is trained.
        return layouts.tensor_bytes(known.adapter()) // (2 if config.train.low_rank == "trained" else 1)
    return _integers_trained(known) if stage == "compact" else _tuned(known)


def _tokens(settings: Optimisation) -> int:
    """Of all rows of all steps, at most."""
    return settings.steps * settings.batch_size * settings.accumulation * settings.length


def _work(stage: str, known: Known) -> _Work:
    config, full, small = known.config, known.architecture, known.small
    stream = _STREAM_COPIES * largest_tensor_bytes(full)
    matrix = _MATRIX_COPIES * largest_matrix_bytes(full)
    if stage == "source":
        # The GGUF loader's model and the clean one that is saved exist together.
        return _Work(0, 2 * FLOAT * parameter_count(full) if known.converts else 0)
    if stage == "calibrate":
        return _Work(_calibration(known), stream)
    if stage in ("score", "decompose"):
        working = matrix + _covariances(known)
        return _Work(0, working if stage == "score" else max(working, stream))
    if stage == "select" and config.prune.method == "lora":
        copies = 2 if config.guide.shrink else 1
        trained = copies * layouts.tensor_bytes(known.decomposed()) + _TRAINED_COPIES * _trained(stage, known)
        return _Work(trained + batch_bytes(known, full, config.align.rank, config.guide) + matrix, stream)
    if stage == "select" and config.prune.measures:
        tokens = max(EVALUATION_TOKENS, config.calibrate.length)
        passing = (
            passing_bytes(full, tokens) + 2 * head_bytes(known, tokens) + FLOAT * config.prune.tokens * full.hidden
        )
        return _Work(layouts.tensor_bytes(known.decomposed()) + passing, max(matrix, stream))
    if stage in ("select", "prune"):
        return _Work(0, max(matrix + _masking(known), stream))
    if stage == "refine" and config.refine.enabled:
        return _Work(_refinement(known), stream)
    compensation = layouts.tensor_bytes(known.compensation()) if config.compensates else 0
    packed = layouts.tensor_bytes(known.pruned())
    if stage == "align" and config.align.enabled:
        asking, targets = _teaching(known, config.align)
        trained = _TRAINED_COPIES * _trained(stage, known)
        training = packed + trained + batch_bytes(known, small, config.align.rank, config.align)
        return _beside(max(asking, training), targets, stream, known)
    if stage == "train":
        rank = config.train.rank
        if config.train.low_rank == "trained":
            rank = max(choice.rank for choice in known.allocation.values())
        asking, targets = _teaching(known, config.train)
        under = dense_bytes(known, small) if config.train.base == "original" else packed + compensation
        training = under + _TRAINED_COPIES * _trained(stage, known) + batch_bytes(known, small, rank, config.train)
        return _beside(max(asking, training), targets, stream, known)
    if stage == "compact" and config.compact.enabled:
        return _compacting(known, stream, matrix)
    if stage in ("recover", "evaluate"):
        passing = passing_bytes(full, EVALUATION_TOKENS) + head_bytes(known, EVALUATION_TOKENS)
        adapters = layouts.tensor_bytes(known.full_adapter())
        if stage == "recover" and config.recover.correction != "none":
            adapters += layouts.tensor_bytes(known.adapter())
        return _Work(rebuilt_bytes(dense_bytes(known, full), known) + adapters + passing, stream)
    return _Work(0, stream if stage == "export" else 0)


def _compacting(known: Known, stream: int, matrix: int) -> _Work:
    """The model under the integer grid with what is trained, its start, a teacher, and blocks before that."""
    batch = batch_bytes(known, known.small, known.compact_rank(), known.config.compact)
    feedback = any(known.config.compact_init(bits) == "feedback" for bits in known.integer_bits.values())
    starting = matrix + (_starting(known) if feedback else 0)
    asking, targets = _teaching(known, known.config.compact)
    trained = _integers_trained(known)
    training = _frozen(known) + max(starting, _TRAINED_COPIES * trained + batch)
    tuned = trained if known.config.compact.block_rows else 0
    # What blocks were tuned to waits on the host, as do a teacher's tokens after that.
    if known.config.device != "cpu":
        return _Work(max(asking, training, _blocks(known, 0, trained, starting)), stream + tuned + targets)
    return _Work(max(targets + max(asking + tuned, training), _blocks(known, tuned, trained, starting)), stream)


def _beside(work: int, kept: int, stream: int, known: Known) -> _Work:
    """Work on the device beside bytes that are kept on the host in any case."""
    return _Work(work + kept, stream) if known.config.device == "cpu" else _Work(work, stream + kept)


def _calibration(known: Known) -> int:
    """Embedding, head and one layer; in the first sweep what autograd keeps of that layer, in the second its
    covariances in float64, and the inputs of o and down. Norms of gradients stay, 4 bytes for each token and distinct
    input, and gate moments, 8 bytes for each sequence and input of o and down.
    """
    full, settings = known.architecture, known.config.calibrate
    width = number_bytes(known)
    outer = sum(math.prod(shape) for name, shape in full.tensors().items() if not name.startswith("model.layers."))
    layer = (parameter_count(full) - outer) // len(full.layers)
    tokens = min(max(CALIBRATION_TOKENS, settings.length), settings.sequences * settings.length)
    norms = FLOAT * settings.sequences * settings.length * len(full.layers) * len(SITES)
    sums = sum(8 * full.site_width(0, site) ** 2 for site in SITES) if settings.covariance else 0
    readers = [
        shape_of(role, shape)[1] for shape in full.layers for role, axis in PRUNED_AXIS.items() if axis == "columns"
    ]
    gates = 8 * settings.sequences * sum(readers)
    inputs = FLOAT * tokens * sum(readers) // len(full.layers)
    backward = max(
        kept_bytes(full, tokens, known) // len(full.layers) + held_bytes(inputs, known),
        head_bytes(known, tokens),
    )
    return width * (outer + 2 * layer) + norms + gates + max(backward, passing_bytes(full, tokens) + sums)


def _teaching(known: Known, settings: Taught) -> tuple[int, int]:
    """While the teacher is asked: embedding and head, one layer and a pass through it; and what stays on the host,
    8 bytes for each likely token. Nothing without a teacher."""
    full = known.architecture
    if not settings.asks:
        return 0, 0
    tokens = _tokens(settings)
    outer = sum(math.prod(shape) for name, shape in full.tensors().items() if not name.startswith("model.layers."))
    layer = (parameter_count(full) - outer) // len(full.layers)
    together = min(tokens, max(CALIBRATION_TOKENS, settings.length))
    targets = 8 * settings.top * tokens
    working = max(passing_bytes(full, together), head_bytes(known, together))
    return number_bytes(known) * (outer + layer) + working, targets


def _refinement(known: Known) -> int:
    """The larger of its two parts. By blocks: the packed maps that come out, embedding and head and one layer of both
    models, and a pass through one layer. End to end: both models, what is tuned, and a pass through all layers.
    """
    full, settings = known.architecture, known.config.refine
    packed, depth = layouts.tensor_bytes(known.decomposed()), len(full.layers)
    tuned = (_TRAINED_COPIES + 1) * _tuned(known)
    outer = number_bytes(known) * sum(math.prod(shape) for shape in full.others().values())
    layer = (
        2 * (dense_bytes(known, full) - outer) + tuned + kept_bytes(full, settings.batch_size * settings.length, known)
    ) // depth
    blocks = packed + 2 * outer + layer
    if not settings.steps:
        return blocks
    return max(blocks, packed + dense_bytes(known, full) + tuned + pass_bytes(known, full, settings, 0))


def _blocks(known: Known, tuned: int, trained: int, starting: int) -> int:
    """While the small model is tuned by blocks: embedding and head and one layer of it, twice, what comes of all layers
    (`tuned`), and of one layer, out of all that is `trained`, its optimiser state, a copy of its start and a pass
    through it, or before that `starting`. Nothing without that part."""
    small, settings = known.small, known.config.compact
    if not settings.block_rows:
        return 0
    outer = number_bytes(known) * sum(math.prod(shape) for shape in small.others().values())
    kept = kept_bytes(small, settings.batch_size * settings.length, known)
    layer = max((_TRAINED_COPIES + 1) * trained + kept, starting * len(small.layers))
    return 2 * outer + tuned + (2 * (dense_bytes(known, small) - outer) + layer) // len(small.layers)


def _covariances(known: Known) -> int:
    """Of the widest input: its covariance and the one before or being unpacked; with feedback two float64 matrices of
    its factorisation, and a root for every order that columns are rounded in.
    """
    settings, largest = known.config.decompose, 0
    if settings.metric != "covariance":
        return 0
    for layer, role, _ in known.architecture.linears():
        width = shape_of(role, known.architecture.layers[layer])[1]
        orders = 1 if PRUNED_AXIS[role] == "columns" else len(settings.block_sizes)
        passing = 2 * 8 + orders * FLOAT if settings.rounding == "feedback" else 0
        largest = max(largest, (2 * FLOAT + passing) * width**2)
    return largest


def _masking(known: Known) -> int:
    """Of the widest input, where single entries go: its covariance and the one before or being unpacked, and three
    float64 matrices of its inverse or factorisation."""
    if not known.config.prune.sparsity.enabled:
        return 0
    widest = max(columns for _, columns in known.architecture.linear_shapes().values())
    return (2 * FLOAT + 3 * 8) * widest**2


def _starting(known: Known) -> int:
    """Of the widest input: its covariance and the one before, two float64 matrices of a factorisation and its root."""
    widths = (known.architecture.site_width(layer, site) for layer in range(len(known.small.layers)) for site in SITES)
    return (2 * FLOAT + 2 * 8 + FLOAT) * max(widths) ** 2


def _frozen(known: Known) -> int:
    """The small model under the integer grid: in the compute dtype, or its linear maps packed. With qa-lora these are
    codes, steps and offsets, and the offsets of a pass; with lsq nothing of them is frozen."""
    settings, found = known.config.compact, dense_bytes(known, known.small)
    if not settings.leaves_adapter:
        found -= number_bytes(known) * known.small.linear_weights()
        return found + (_integers_bytes(known, ".codes", ".scale", ".offset", ".offset") if _pooled(known) else 0)
    if settings.packed_bits is None:
        return found
    rank = known.compact_rank() if settings.warm_start and settings.method == "l4q" else 0
    choice = Choice("nf", settings.packed_bits, settings.group_size, rank, 32, "float32", factor_dtype="float32")
    for layer, role, _ in known.small.linears():
        rows, columns = shape_of(role, known.small.layers[layer])
        packed = layouts.packed_bytes(PackedShape(columns, rows, choice, transposed=False))
        found -= number_bytes(known) * rows * columns - packed
    return found


def _integers_trained(known: Known) -> int:
    """fp32 values that compact trains: steps and offsets with factors or, of lsq, with the weights; of qa-lora factors
    whose inputs are one for each group."""
    settings, small = known.config.compact, known.small
    if _pooled(known):
        shapes = small.linear_shapes().values()
        return FLOAT * settings.rank * sum(rows + columns // settings.group_size for rows, columns in shapes)
    steps = _integers_bytes(known, ".scale", ".offset")
    if settings.leaves_adapter:
        return steps + layouts.tensor_bytes(known.compact_adapter())
    return steps + FLOAT * small.linear_weights()


def _pooled(known: Known) -> bool:
    return known.config.compact.method == "qa-lora"


def _integers_bytes(known: Known, *kinds: str) -> int:
    """Tensors of these kinds in the integer model, one named twice counted twice."""
    tensors = known.integers().items()
    return sum(spec.nbytes for kind in kinds for name, spec in tensors if name.endswith(kind))


def _tuned(known: Known) -> int:
    """fp32 scales, levels and low-rank factors of the full model, which refine tunes."""
    found = 0
    for layer, role, name in known.architecture.linears():
        rows, columns = shape_of(role, known.architecture.layers[layer])
        choice = known.allocation[name]
        found += rows * columns // choice.block_size + 2**choice.bits + choice.rank * (rows + columns)
    return FLOAT * found

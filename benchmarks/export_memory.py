"""Peak memory of export on a deep model: what it takes beside the libraries, over the bytes of one layer.

    python benchmarks/export_memory.py [--short] [--json FILE] [--layers 64] [--width 1024]

A Llama of 64 layers, 8192 wide with a feed-forward of 28672 and 64 heads over 8, shrunk to `--width` (8192 is the real
one: 220 GB of fp32 weights on disk and about 540 more of what is written). Weights, adapters and integers are random;
what is written is the adapter, the merged model, the small one dense, and as integers for compressed-tensors and
both versions of GPTQ. Ours is the high-water mark of resident memory while that happens less what was resident before,
the peer the fp32 bytes of one layer.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import rows
import torch
from rows import Row
from torch import Tensor

from qlora_pipe import layouts
from qlora_pipe.architectures import from_config
from qlora_pipe.artifacts.layout import Layout, TensorSpec
from qlora_pipe.artifacts.manifest import Manifest
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.artifacts.tensors import TensorWriter, torch_dtype_of
from qlora_pipe.config_file import load
from qlora_pipe.events import Reporter
from qlora_pipe.footprint import FLOAT
from qlora_pipe.meter import Meter, release_memory
from qlora_pipe.plan import know
from qlora_pipe.sources import read_config
from qlora_pipe.stages import export
from qlora_pipe.stages.base import Context
from qlora_pipe.transfer import Losses

LAYERS_ALIVE = 3
SHAPE = {"intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
WIDTH = 8192
FORMATS = ["compressed-tensors", "gptq", "gptq_v2"]


def random_tensor(name: str, spec: TensorSpec) -> Tensor:
    """Any codes, positive steps, small weights."""
    dtype = torch_dtype_of(spec.dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8).view(dtype).reshape(spec.shape)
    values = torch.randn(spec.shape, dtype=dtype).mul_(0.02)
    return values.abs_().add_(0.001) if name.endswith(".scale") else values


def write(folder: Path, layout: Layout, stem: str = "model") -> None:
    """Random tensors of a layout, one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with TensorWriter(folder, layout, stem=stem) as writer:
        for name, spec in layout.items():
            writer.write(name, random_tensor(name, spec))


def settings(folder: Path, layers: int, width: int) -> Path:
    """The model's config.json, its weights' place, and a configuration that exports everything."""
    heads = {name: max(1, size * width // WIDTH) for name, size in SHAPE.items()}
    model: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width}
    model |= heads | {"num_hidden_layers": layers, "vocab_size": 512, "head_dim": 128, "rms_norm_eps": 1e-5}
    model |= {"tie_word_embeddings": False, "max_position_embeddings": 4096, "hidden_act": "silu"}
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(model))
    (folder / "text.txt").write_text("word " * 2000)
    body = {
        "model": str(folder / "model"),
        "run": str(folder / "run"),
        "data": {"calibration": str(folder / "text.txt"), "task": str(folder / "text.txt")},
        "prune": {"ffn_ratio": 0.0},
        "export": {"integer": FORMATS},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(body))
    return path


def prepared(folder: Path, layers: int, width: int) -> Context:
    """What export sees of a run whose earlier stages are done."""
    config = load(settings(folder, layers, width))
    base, run = folder / "model", folder / "run"
    write(base, layouts.dense(from_config(read_config(base)), "float32"))
    known = know(config, base)
    for stage in ("compact", "recover"):
        for stem, layout in known.outputs(stage).items():
            write(run / stage, layout, stem)
    said = {"tokens": 1, "base": config.recover.base, "correction": "none"}
    bodies = {
        "source/source.json": {"license": None},
        "allocate/allocation.json": {"bits_per_weight": 4.0, "gap": 0.0},
        "recover/recovery.json": {"scale": 1.0, "tau": None, "losses": dict.fromkeys(Losses._fields, 1.0)} | said,
    }
    for name, body in bodies.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body))
    (run / "export").mkdir()
    inputs = {
        stage: Artifact(run / stage, Manifest(stage, "", 1, {}, {"model": ""}, {}, {})) for stage in export.STAGE.inputs
    }
    return Context(config, known, base, inputs, run / "export", run, Reporter())


def measure(given: argparse.Namespace) -> Iterator[Row]:
    """One row: the peak over a layer."""
    layers, width = (8, 512) if given.short else (given.layers, given.width)
    with tempfile.TemporaryDirectory() as place:
        seen = prepared(Path(place), layers, width)
        tensors = seen.known.architecture.tensors()
        layer = FLOAT * sum(math.prod(shape) for name, shape in tensors.items() if name.startswith("model.layers.0."))
        release_memory()
        before = psutil.Process().memory_info().rss
        with Meter() as meter:
            export.STAGE.run(seen)
        peak = meter.peak_bytes - before
        written = sum(path.stat().st_size for path in seen.out.rglob("*.safetensors"))
    ratio = peak / layer
    name = f"export of {layers} layers {width} wide ({written / 1e9:.1f} GB): peak / a layer"
    yield Row(name, peak, layer, ratio, f"< {LAYERS_ALIVE}", ratio < LAYERS_ALIVE, 0.0)


if __name__ == "__main__":
    options = rows.parser("Peak memory of export, in layers.")
    options.add_argument("--layers", type=int, default=64, metavar="N")
    options.add_argument(
        "--width", type=int, default=1024, metavar="N", help="of the residual stream, a multiple of 128"
    )
    arguments = options.parse_args()
    rows.show(measure(arguments), arguments.json)

"""Peak memory of calibrate to decompose on synthetic Llamas of equal width and more and more layers.

    python benchmarks/decompose_memory.py [--short] [--json FILE]

Random checkpoints of 2, 8 and 32 layers (hidden 512, feed-forward 1408, 260 tokens), in shards. Each is run in a
process of its own; a stage's peak is the high-water mark of its resident memory, imported libraries included. Ours is
the deeper model's peak, the peer that of the one with 2 layers; what the added layers weigh in fp32 is named, since a
stage that held the model would grow by it. Planned bytes are those of the plan, written ones those on disk.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rows
import torch
from rows import Row
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DEPTHS = (2, 8, 32)
TOLERANCE = 0.1
STAGES = ("calibrate", "score", "decompose")


def checkpoint(folder: Path, layers: int) -> int:
    """A random Llama and its byte tokenizer; its bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=260,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="32MB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def decomposed(folder: Path, layers: int, sequences: int) -> tuple[int, dict[str, float], dict[str, int], int]:
    """Run one model: its bytes, peaks by stage, and planned and written bytes of the weights."""
    model, run, text = folder / f"model-{layers}", folder / f"run-{layers}", folder / "text.txt"
    size = checkpoint(model, layers)
    text.write_text(" ".join(f"word {number * 7919 % 1009}" for number in range(20_000)))
    config = {
        "model": str(model),
        "run": str(run),
        "data": {"calibration": str(text), "task": str(text)},
        "calibrate": {"sequences": sequences, "length": 256},
        "decompose": {"budget": "3bits", "block_sizes": [32, 64], "ranks": [0, 16], "iterations": 2},
        "prune": {"ffn_ratio": 0.0},
    }
    path = folder / f"run-{layers}.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "qlora_pipe", "run", str(path), "--until", "decompose"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    stats = json.loads((run / "stats.json").read_text())
    manifest = json.loads((run / "decompose" / "manifest.json").read_text())
    written = sum((run / "decompose" / name).stat().st_size for name in manifest["planned"])
    return size, {stage: stats[stage]["peak_bytes"] for stage in STAGES}, manifest["planned"], written


def measure(short: bool) -> Iterator[Row]:
    """Peaks beside those of the shallowest model, and bytes of every model."""
    depths = DEPTHS[:2] if short else DEPTHS
    with tempfile.TemporaryDirectory() as place:
        least, base = 0, {}
        for layers in depths:
            size, peaks, planned, written = decomposed(Path(place), layers, 2 if short else 16)
            if not base:
                least, base = size, peaks
            else:
                for stage, peak in peaks.items():
                    ratio = peak / base[stage]
                    more = f"{(size - least) / 1e6:.0f} MB more weights"
                    name = f"{stage}: peak bytes, {layers} / {depths[0]} layers ({more})"
                    yield Row(name, peak, base[stage], ratio, "1 +- 0.1", abs(ratio - 1) <= TOLERANCE, 0.0)
            total = sum(planned.values())
            name = f"decompose, {layers} layers: bytes written / planned"
            yield Row(name, written, total, written / total, "= 1", written == total, 0.0)


if __name__ == "__main__":
    rows.run("Peak memory of calibrate to decompose as a model gets deeper.", measure)

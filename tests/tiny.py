"""A random tiny model with a byte tokenizer, and configurations for it: plumbing, never quality."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_pipe.allocation import read_allocation
from qlora_pipe.artifacts.store import Artifact
from qlora_pipe.config import Config
from qlora_pipe.events import Reporter
from qlora_pipe.plan import know
from qlora_pipe.stages.base import Context

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def save_tiny_model(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A Hugging Face folder with random weights that are larger than the default init, so that errors show."""
    config = AutoConfig.for_model(model_type, **{**SIZES, "initializer_range": 0.2, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, special tokens, one that is added without being special, and a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=276, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "<|start|>"], show_progress=False
    )
    core.train_from_iterator(["the word of the line is blue", "what is the 3rd word of line 12"] * 4, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|start|>", pad_token="<|endoftext|>"
    )
    found.add_tokens(["<think>"])
    found.chat_template = "{% for message in messages %}<|start|>{{ message['content'] }}{% endfor %}"
    return found


def save_texts(folder: Path) -> None:
    """A text file and a set of records."""
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [f"the {n}th word of line {n * 7 % 13} is {'abcdefgh'[n % 8] * 3}." for n in range(400)]
    (folder / "text.txt").write_text(" ".join(sentences))
    records = [{"title": f"item {n}", "extract": f"item {n} is {'red' if n % 2 else 'blue'}."} for n in range(80)]
    (folder / "records.json").write_text(json.dumps(records))


def tiny_settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of the whole chain that takes a second or two of computing."""
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "run": str(folder / "run"),
        "data": {
            "calibration": str(folder / "text.txt"),
            "task": {
                "source": str(folder / "records.json"),
                "prompt": "What is {title}?",
                "response": "{extract}",
                "heldout": 0.3,
            },
            "evaluation": {"text": str(folder / "text.txt")},
        },
        "calibrate": {"sequences": 2, "length": 64},
        "decompose": {
            "budget": "6bits",
            "bits": [2, 3, 4],
            "block_sizes": [16, 32],
            "ranks": [4],
            "iterations": 3,
        },
        "prune": {"kv_ratio": 0.5, "ffn_ratio": 0.3, "align": 32},
        "train": {"rank": 4, "steps": 4, "batch_size": 2, "length": 64, "save_steps": 2},
        "compact": {"rank": 4, "steps": 3, "batch_size": 2, "length": 64, "save_steps": 1, "group_size": 32},
        "recover": {"rows": 4, "scales": [0.0, 1.0]},
        "evaluate": {"tokens": 200, "length": 64},
    }
    for key, value in changes.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return settings


def save_settings(folder: Path, **changes: Any) -> Path:
    """The configuration file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(folder, **changes)))
    return path


def context_of(config: Config, artifacts: Mapping[str, Artifact]) -> Context:
    """What a stage would see that comes after `artifacts`."""
    place = Path(str(config.run))
    base = (place / "base").resolve()
    made = Context(config, know(config, base), base, artifacts, place, place, Reporter(json_lines=True))
    allocation = read_allocation(made.read_json("allocate", "allocation.json"))
    return replace(made, known=made.known.with_allocation(allocation))

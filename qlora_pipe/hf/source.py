"""Bringing a model to a Hugging Face folder of safetensors: download from a hub, or convert a GGUF file once."""

import json
import shutil
import stat
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from qlora_pipe.artifacts.store import Store, Ticket
from qlora_pipe.events import Reporter
from qlora_pipe.hf.hub import download
from qlora_pipe.sources import CONVERSION, ModelSource, cache_folder, converted_folder, is_converted


def quiet() -> None:
    """Keep transformers' own bars and notices out of ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def fetch(source: ModelSource, reporter: Reporter) -> Path:
    """The Hugging Face folder of a model; raises SourceError. Peak bytes: for GGUF, the dense fp32 model twice."""
    if source.path is None:
        return download(source.name)
    if source.kind == "gguf":
        return _convert(source.path, reporter)
    return source.path


def _convert(gguf: Path, reporter: Reporter) -> Path:
    """Dequantise a GGUF file into a Hugging Face folder, cached by content.

    Peak bytes: transformers' loader holds the fp32 model and its state dict for a moment.
    """
    folder = converted_folder(gguf)
    if is_converted(folder):
        reporter.event("cached", f"{gguf.name}: using the conversion cached at {folder}")
        return folder
    reporter.event("convert", f"{gguf.name}: converting to safetensors once, cached at {folder}")
    quiet()
    parent = str(gguf.parent)
    model = AutoModelForCausalLM.from_pretrained(
        parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=gguf.name)
    scratch = Store(cache_folder() / "convert")
    ticket = Ticket("model", CONVERSION, {}, {"gguf": folder.name})
    with scratch.lock(), scratch.writing(ticket) as place:
        config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        clean = type(model)(AutoConfig.for_model(**config))
        clean.load_state_dict(model.state_dict())
        clean.generation_config = model.generation_config
        clean.save_pretrained(place)
        tokenizer.save_pretrained(place)
        _portable_tokenizer(place)
        for path in place.iterdir():
            path.chmod(path.stat().st_mode | stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
        planned = {path.name: path.stat().st_size for path in place.glob("*.safetensors")}
        artifact = scratch.commit(ticket, place, planned)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        artifact.folder.rename(folder)
    return folder


def _portable_tokenizer(folder: Path) -> None:
    """Name a tokenizer class that every transformers release knows, and drop entries that speak of this machine."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")

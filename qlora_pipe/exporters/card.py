"""The model card (README.md) of an exported folder: what it is, what is exact, how to load it. It says what artifacts
say, and nothing else."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "FOLDER")"""
_GPTQ = """\
from gptqmodel import GPTQModel

model = GPTQModel.load("FOLDER")"""
_GGUF = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="model.gguf")
tokenizer = AutoTokenizer.from_pretrained("FOLDER", gguf_file="model.gguf")"""
_BITSANDBYTES = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
model = PeftModel.from_pretrained(model, "FOLDER/adapter")  # where there is one: the low-rank parts"""
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")"""

_TITLES = {
    "peft": "an adapter for the full {}",
    "merged": "the full {} with an adapter added",
    "small": "{}, pruned and trained",
    "compressed-tensors": "{}, pruned, as integers, in compressed-tensors",
    "gptq": "{}, pruned, as integers, in GPTQ",
    "gptq_v2": "{}, pruned, as integers, in GPTQ version 2",
    "gguf": "{}, pruned, as integers, in GGUF",
    "bitsandbytes": "the full {}, decomposed, in NF4 of bitsandbytes",
}
_NEEDS = {
    "peft": "peft and transformers",
    "compressed-tensors": "transformers and compressed-tensors",
    "gptq": "GPTQModel (or transformers beside it, if all matrices have one width)",
    "gptq_v2": "GPTQModel (or transformers beside it, if all matrices have one width)",
    "bitsandbytes": "transformers, bitsandbytes and peft",
    "gguf": "transformers and gguf, which make the matrices dense, or another reader of llama.cpp's format",
}


@dataclass(frozen=True)
class Origin:
    """What all cards of a run say alike.

    The base: its name, whether that is one of the model hub, the licence that its config.json states, the identity of
    its files. What was decomposed: the budget as it was given, bits per block weight taken, the relative gap to the
    best allocation that was proved, matrices by code width. Matrices of the integer model by width, none without one.
    """

    model: str
    hub: bool
    license: str | None
    identity: str
    budget: str
    bits_per_weight: float
    gap: float
    bits: Mapping[int, int]
    integer_bits: Mapping[int, int]

    @property
    def name(self) -> str:
        """The model without its owner, kind or folder."""
        return self.model.rpartition("/")[2].removeprefix("package:")


def histogram(bits: Iterable[int]) -> dict[int, int]:
    """Matrices by width, the smallest first."""
    return dict(sorted(Counter(bits).items()))


def write_card(folder: Path, origin: Origin, said: Mapping[str, Any], recovery: Mapping[str, Any]) -> None:
    """Write README.md into an exported folder, which is named after what it holds. `said`: its part of export.json;
    `recovery`: what was measured of the adapter."""
    kind = folder.name
    ours = kind == "small" and "quantization_config" in json.loads((folder / "config.json").read_text())
    lines = [
        *("---", f"library_name: {'peft' if kind == 'peft' else 'transformers'}"),
        *([f"base_model: {origin.model}"] if origin.hub else []),
        *([f"license: {json.dumps(origin.license)}"] if origin.license else []),
        *("---", "", f"# {_TITLES[kind].format(origin.name)}", ""),
        f"Base: `{origin.model if origin.hub else origin.name}`, files of identity `{origin.identity}`; "
        + (f"its config.json states the licence {origin.license}." if origin.license else "it states no licence."),
        *("", "## What it is", "", *(f"- {fact}" for fact in _facts(kind, origin, said, recovery))),
        *("", "## Loading it", "", f"It needs {_NEEDS.get(kind, 'transformers')}{' and qlora_pipe' if ours else ''}."),
        *("", "```python", *(["import qlora_pipe"] if ours else []), _loading(kind, origin), "```"),
        *("", "## Making it again", "", "```sh", "qlora-pipe run config.yaml", "```", ""),
        "`config.yaml` lies in the run folder and holds every setting; the hash of this folder's files is in the",
        "`manifest.json` beside it.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _facts(kind: str, origin: Origin, said: Mapping[str, Any], recovery: Mapping[str, Any]) -> Iterator[str]:
    if kind in ("peft", "merged"):
        scale, losses = recovery["scale"], recovery["losses"]
        yield (
            f"The adapter was trained on a small model and put back at scale {scale:g}, the best of those that were "
            f"tried: held-out loss {losses['full_adapted']:.4f} with it, {losses['full']:.4f} without, nats a "
            f"token on {recovery['tokens']} tokens, on the {recovery['base']} model."
        )
        if kind == "peft":
            scaled = "" if said["scale"] == 1 else ", B times the scale"
            yield f"Its factors: {said['factors']}{', bit for bit' if said['exact'] else scaled}."
        else:
            corrected = "" if recovery["correction"] == "none" else ", corrected for the weights it was trained on"
            yield f"Weights: {said['weights']}{corrected}, stored in {said['dtype']}."
    elif "codes" in said:
        yield f"Integers: {_listed(origin.integer_bits)}; {said['codes']}, bit for bit."
        if kind == "compressed-tensors":
            yield "Steps are stored in float32 as they were trained; a reader that loads in 16 bits rounds them."
            if 3 in origin.integer_bits:
                yield "3-bit codes lie densely, as in compressed-tensors 0.20; early releases put ten into a word."
        else:
            change = said["largest_change_of_a_step"]
            beside = "" if kind == "gguf" else "; so are biases"
            yield f"Steps are rounded to float16, none by more than {change:.1e} of itself{beside}."
        if "largest_change_of_an_offset" in said:
            moved = said["largest_change_of_an_offset"]
            yield f"So are the smallest weights of groups, none by more than {moved:.1e} of a step."
        if kind in ("gptq", "gptq_v2"):
            yield f"A stored zero point is the true one{' minus 1' if kind == 'gptq' else ''}; all are symmetric."
        small = ", norms and biases in float32" if kind == "gguf" else ""
        yield f"All else is stored in {said['dtype']}{small}."
    else:
        yield f"Weights: {said['weights']}, stored in {said['dtype']}."
    yield (
        f"The run's budget was {origin.budget}; its decomposed model takes {origin.bits_per_weight:.4g} bits per block "
        f"weight ({_listed(origin.bits)}), an allocation within {100 * origin.gap:.2g} % of the best, as proved."
    )


def _loading(kind: str, origin: Origin) -> str:
    if kind == "peft":
        return _PEFT.format(base=origin.model if origin.hub else "BASE")
    if kind in ("gptq", "gptq_v2"):
        return _GPTQ
    if kind == "gguf":
        return _GGUF
    if kind == "bitsandbytes":
        return _BITSANDBYTES
    return _TRANSFORMERS


def _listed(bits: Mapping[int, int]) -> str:
    return ", ".join(
        f"{count} {'matrix' if count == 1 else 'matrices'} of {width} bits" for width, count in bits.items()
    )

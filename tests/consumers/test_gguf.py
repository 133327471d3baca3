"""The integer model as a GGUF file, loaded by stock transformers in a process that does not know of us, and its codes
read by the gguf package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pipeline.test_chain import Recorder
from safetensors.torch import load_file
from tiny import bpe_tokenizer, context_of, save_settings, save_texts, save_tiny_model
from tiny_integers import Integers
from torch import Tensor

from prune.indexmap import IndexMap
from qlora_pipe.compile import compile_model
from qlora_pipe.config_file import load
from qlora_pipe.consumers import Check, open_run
from qlora_pipe.errors import ArtifactError
from qlora_pipe.gguf_layout import gguf_bytes, gguf_keys, gguf_name, gguf_tensors
from qlora_pipe.stages.base import Context
from qlora_pipe.stages.models import integer_model, integer_weight
from qlora_pipe.verify import verify_path
from qlora_pipe.verify_integers import check_exported
from quant.pack import unpack

IDS = torch.arange(40)[None] + 30
TEXTS = ("the 3rd word of line 12 is blue.", "  two\n\n lines\t<|start|>é <think>the<|endoftext|> 1234's")
# Heads are permuted in files of llama, and qwen2 has biases: both with two widths.
WIDTHS = {"llama": {"q": 8, "down": 8}, "qwen2": {"v": 8}}
SCRIPT = """
import json
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

texts, found, tokens = json.loads(sys.argv[2]), {}, {}
for folder in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    ids = [tokenizer(text).input_ids for text in texts]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "word"}], tokenize=False)
    tokens[folder] = [ids, [tokenizer.decode(each) for each in ids], chat, tokenizer.eos_token]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        found[folder] = model(torch.arange(40)[None] + 30).logits
    found |= {f"{folder}:{name}": value.clone() for name, value in model.state_dict().items()}
assert not {"qlora_pipe", "quant"} & set(sys.modules)
save_file(found, sys.argv[1])
print(json.dumps(tokens))
"""


class Files:
    """Two models of random codes, a finished run whose 4-bit codes have offsets, and what was made of the files."""

    def __init__(self, place: Path) -> None:
        self.integers: dict[str, Integers] = {}
        folders = []
        for kind, widths in WIDTHS.items():
            self.integers[kind] = integers = Integers(save_model(place / "base" / kind, kind), widths)
            folders.append(place / kind)
            folders[-1].mkdir()
            self.change = integers.write(folders[-1], "gguf", "float16")
        save_model(place / "model", "llama")
        save_texts(place)
        options = ("compact.offset=trained", "export.integer=[gguf]", "export.dtype=bfloat16", "export.merged=false")
        settings = load(save_settings(place), options)
        self.context: Context = context_of(settings, compile_model(settings, Recorder()))
        self.run = place / "run"
        folders.append(self.run / "export/gguf")
        command = [sys.executable, "-I", "-c", SCRIPT, str(place / "found"), json.dumps(TEXTS), *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        self.folders = dict(zip((*WIDTHS, "run"), folders, strict=True))
        found = load_file(place / "found")
        self.found = {
            name: {key.removeprefix(str(folder)): value for key, value in found.items() if key.startswith(str(folder))}
            for name, folder in self.folders.items()
        }
        tokens = json.loads(done.stdout.splitlines()[-1])
        self.tokens: dict[str, Any] = {name: tokens[str(folder)] for name, folder in self.folders.items()}


def save_model(folder: Path, kind: str) -> Path:
    save_tiny_model(folder, kind, vocab_size=288)
    bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("gguf"))


def tensors(folder: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize("kind", WIDTHS)
def test_the_gguf_package_has_the_codes(files: Files, kind: str) -> None:
    """A weight over its step is a code; rows of q and k of llama stand in pairs that rotate, as neighbours."""
    integers, found = files.integers[kind], tensors(files.folders[kind])
    for layer, role, name in integers.tiny.architecture.linears():
        bits, stored = integers.bits[name], found[gguf_name(f"{name}.weight")]
        assert stored.tensor_type.name == ("Q8_0" if bits == 8 else "Q4_0")
        weight = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float64)
        codes, steps = integers.codes[name].numpy(), integers.tensors[f"{name}.scale"].half().double().numpy()
        if kind == "llama" and role in ("q", "k"):
            heads = integers.tiny.architecture.layers[layer].head_dim
            rows = [head + half + pair for head in range(0, len(codes), heads) for pair in range(heads // 2)
                    for half in (0, heads // 2)]  # fmt: skip
            codes, steps = codes[rows], steps[rows]
        read = np.rint(weight / steps.repeat(32, axis=1)) + 2 ** (bits - 1)
        assert (read == codes).all()
        assert (weight == (codes - 2.0 ** (bits - 1)) * steps.repeat(32, axis=1)).all()


@pytest.mark.parametrize("kind", WIDTHS)
def test_stock_transformers_has_the_weights_and_the_logits(files: Files, kind: str) -> None:
    integers, found = files.integers[kind], files.found[kind]
    for name in integers.codes:
        assert torch.equal(found[f":{name}.weight"], integers.weight(name, torch.float16))
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(found[f":{name}"], integers.read(name).half().float())
    with torch.no_grad():
        expected = integers.model(torch.float16)(IDS).logits
    assert expected.std() > 0.1
    assert float((found[""] - expected).norm() / expected.norm()) < 2**-9  # the embedding is fp16


def test_a_run_with_offsets_is_what_was_trained(files: Files) -> None:
    """Steps and the weights of the lowest codes are rounded to fp16: by 2^-12 steps for each of 15 and of 8 steps, and
    once more for a trained offset, at most."""
    context, found = files.context, files.found["run"]
    reader = context.reader("compact")
    stored = tensors(files.folders["run"])
    for name in context.known.integer_bits:
        scale = reader.read(f"{name}.scale")
        offset = reader.read(f"{name}.offset")
        assert bool(offset.any())
        assert stored[gguf_name(f"{name}.weight")].tensor_type.name == "Q4_1"
        exact = integer_weight(context, reader, name)
        step = scale.repeat_interleave(32, dim=1)
        assert float(((found[f":{name}.weight"] - exact) / step).abs().max()) < 15 * 2**-11 + 16 * 2**-11
        smallest = (offset - 8 * scale).half().float().repeat_interleave(32, dim=1)
        codes = torch.round((found[f":{name}.weight"] - smallest) / scale.half().float().repeat_interleave(32, dim=1))
        assert torch.equal(codes.to(torch.uint8), unpack(reader.read(f"{name}.codes"), 4, scale.shape[1] * 32))
    with torch.no_grad():
        expected: Tensor = integer_model(context, reader)(IDS).logits
    assert float((found[""] - expected).norm() / expected.norm()) < 0.02  # the embedding is bf16


@pytest.mark.parametrize("name", [*WIDTHS, "run"])
def test_the_tokenizer_is_that_of_the_base(files: Files, name: str) -> None:
    base = bpe_tokenizer()
    ids, texts, chat, end = files.tokens[name]
    assert ids == [base(text).input_ids for text in TEXTS]
    assert texts == [base.decode(each) for each in ids] == list(TEXTS)
    assert chat == base.apply_chat_template([{"role": "user", "content": "word"}], tokenize=False)
    assert end == "<|endoftext|>"


@pytest.mark.parametrize("kind", WIDTHS)
def test_planned_bytes_are_written(files: Files, kind: str) -> None:
    integers = files.integers[kind]
    given = (integers.tiny.architecture, "float16", integers.settings, integers.bits)
    keys = gguf_keys(integers.base, given[0], given[2], given[3])
    assert (files.folders[kind] / "model.gguf").stat().st_size == gguf_bytes(gguf_tensors(*given), keys)


def test_a_run_keeps_its_plan_and_says_what_it_wrote(files: Files) -> None:
    plan = json.loads((files.run / "plan.json").read_text())
    planned = next(row["files"] for row in plan["stages"] if row["name"] == "export")
    assert planned["gguf/model.gguf"] == (files.run / "export/gguf/model.gguf").stat().st_size
    assert list(verify_path(files.run))
    said = json.loads((files.run / "export/export.json").read_text())["gguf"]
    assert not said["exact"]
    assert 0 < said["largest_change_of_a_step"] <= 2**-11
    assert 0 < said["largest_change_of_an_offset"] < 16 * 2**-11
    card = (files.run / "export/gguf/README.md").read_text()
    assert "14 matrices of 4 bits; those of the last step of training, bit for bit" in card
    assert 'gguf_file="model.gguf"' in card


def test_the_check_of_consumers_sees_it(files: Files, tmp_path: Path) -> None:
    verdict = Check(open_run(files.run)[0], files.run, "float32").verdict("gguf")
    assert verdict.holds
    assert (verdict.note, verdict.reader) == ("the same", "gguf")
    run = tmp_path / "run"
    shutil.copytree(files.run, run, symlinks=True)
    place = tensors(run / "export/gguf")["blk.1.ffn_up.weight"].data_offset
    with (run / "export/gguf/model.gguf").open("r+b") as stream:
        stream.seek(place + 7)
        octet = stream.read(1)[0]
        stream.seek(place + 7)
        stream.write(bytes([octet ^ 1]))
    verdict = Check(open_run(run)[0], run, "float32").verdict("gguf")
    assert not verdict.holds
    assert verdict.note == "DIFFERS: codes or steps of model.layers.1.mlp.up_proj"
    kept = IndexMap.from_json(json.loads((run / "select/kept.json").read_text()))
    with pytest.raises(ArtifactError, match=r"codes or steps of model.layers.1.mlp.up_proj are not those of compact"):
        check_exported(run, kept)

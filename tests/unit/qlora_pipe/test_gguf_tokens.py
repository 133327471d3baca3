"""What a GGUF file says of a tokenizer and of a model, and which of them it cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import bpe_tokenizer, byte_tokenizer, save_settings, save_tiny_model
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qlora_pipe.architectures import from_config
from qlora_pipe.config_file import load
from qlora_pipe.config_training import Compact
from qlora_pipe.errors import ConfigError, SourceError
from qlora_pipe.gguf_layout import gguf_bytes, gguf_keys, gguf_name
from qlora_pipe.gguf_tokens import SPLITS, tokenizer_keys
from qlora_pipe.plan import know, make_plan

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    before = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [before, LEVEL]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder, vocab_size=288)
    bpe_tokenizer().save_pretrained(folder)
    return folder


def changed(base: Path, folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_text((base / name).read_text())
    body = json.loads((folder / file).read_text())
    change(body)
    (folder / file).write_text(json.dumps(body))
    return folder


def test_every_number_has_a_token_of_its_kind(base: Path) -> None:
    tokenizer, keys = bpe_tokenizer(), tokenizer_keys(base, 288)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[len(tokenizer) :] == [f"[PAD{index}]" for index in range(len(tokenizer), 288)]
    special = {"<|endoftext|>": 3, "<|start|>": 3, "<think>": 4}
    assert kinds == [special.get(str(token), 1) for token in tokens[: len(tokenizer)]] + [5] * (288 - len(tokenizer))
    named = {key: keys[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "padding")}
    assert named == {"bos": 1, "eos": 0, "padding": 0}
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert not keys["tokenizer.ggml.add_bos_token"]
    assert "message['content']" in str(keys["tokenizer.chat_template"])


def test_splits_are_those_that_transformers_knows_by_name() -> None:
    assert {name: GGUF_PRE_TOKENIZER_SPLITS[name] for name in SPLITS.values()} == {v: k for k, v in SPLITS.items()}


@pytest.mark.parametrize(("pattern", "name"), SPLITS.items())
def test_splits_are_recognised(base: Path, tmp_path: Path, pattern: str, name: str) -> None:
    def change(body: dict[str, Any]) -> None:
        body.update(pre_tokenizer=split(pattern))
        body["model"].update(ignore_merges=name == "llama-bpe")

    folder = changed(base, tmp_path, "tokenizer.json", change)
    assert tokenizer_keys(folder, 288)["tokenizer.ggml.pre"] == name


def test_what_stands_around_a_text_is_said(base: Path, tmp_path: Path) -> None:
    single = [
        {"SpecialToken": {"id": "<|start|>"}},
        {"Sequence": {"id": "A"}},
        {"SpecialToken": {"id": "<|endoftext|>"}},
    ]
    post = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": single}]}
    keys = tokenizer_keys(changed(base, tmp_path, "tokenizer.json", lambda body: body.update(post_processor=post)), 288)
    assert keys["tokenizer.ggml.add_bos_token"]
    assert keys["tokenizer.ggml.add_eos_token"]


QWEN, LLAMA = (next(key for key, value in SPLITS.items() if value == name) for name in ("qwen2", "llama-bpe"))
TOKENIZERS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda body: body["model"].update(type="Unigram"), "another model than byte-level BPE with merges"),
    (lambda body: body["model"].update(byte_fallback=True), "another model than byte-level BPE"),
    (lambda body: body["model"].update(unk_token="<unk>"), "a BPE with dropout, an unknown token"),
    (lambda body: body["model"].update(ignore_merges=True), "takes whole words before merges, split as gpt-2"),
    (lambda body: body.update(pre_tokenizer=split(LLAMA)), "does not take whole words before merges, split as llama"),
    (lambda body: body.update(normalizer={"type": "Lowercase"}), "the normaliser Lowercase"),
    (lambda body: body.update(pre_tokenizer=split(QWEN + "|x")), "a way to split text that has no name"),
    (lambda body: body.update(pre_tokenizer=split(LLAMA, invert=True)), "a way to split text that has no name"),
    (lambda body: body["pre_tokenizer"].update(add_prefix_space=True), "a way to split text that has no name"),
    (lambda body: body.update(pre_tokenizer=LEVEL), "a way to split text that has no name"),
    (lambda body: body["added_tokens"][0].update(content="<|é|>"), "'<|é|>', which is not printable ASCII"),
    (lambda body: body["added_tokens"][0].update(lstrip=True), "takes in what stands beside it"),
    (
        lambda body: body.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[CLS]"}}, {"Sequence": {"id": "A"}}],
            }
        ),
        r"\['\[CLS\]'\] before a text and \[\] behind it",
    ),
]


@pytest.mark.parametrize(("change", "says"), TOKENIZERS)
def test_other_tokenizers_are_refused(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    folder = changed(base, tmp_path, "tokenizer.json", change)
    with pytest.raises(ConfigError, match=f"as GPT-2, Llama 3 and Qwen 2 have it, found .*{says}.*: take compressed"):
        tokenizer_keys(folder, 288)


def test_tokens_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token 270, of a model with 270"):
        tokenizer_keys(base, 270)
    folder = changed(base, tmp_path, "tokenizer_config.json", lambda body: body.update(eos_token={"content": "</s>"}))
    with pytest.raises(ConfigError, match="the special token '</s>', which it has no number for"):
        tokenizer_keys(folder, 288)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="byte-level BPE with merges"):
        tokenizer_keys(tmp_path, 288)
    (tmp_path / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(SourceError, match=r"expected a tokenizer, found .*fetch it again"):
        tokenizer_keys(tmp_path, 288)
    folder = changed(base, tmp_path, "tokenizer.json", lambda body: body["post_processor"].update(single=[]))
    with pytest.raises(SourceError, match="expected a tokenizer, found ValueError"):
        tokenizer_keys(folder, 288)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        tokenizer_keys(tmp_path, 288)


MODELS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda body: body.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "with yarn rotary scaling"),
    (
        lambda body: body.pop("rope_parameters") and body.update(rope_theta=1e4, rope_scaling={"type": "linear"}),
        "with linear rotary scaling",
    ),
    (lambda body: body.update(hidden_act="gelu"), "with the activation gelu"),
    (lambda body: body.update(use_sliding_window=True), "with sliding windows"),
    (
        lambda body: body.pop("rms_norm_eps"),
        "whose config.json has no rope_theta, rms_norm_eps or max_position_embeddings",
    ),
]


@pytest.mark.parametrize(("change", "says"), MODELS)
def test_models_that_readers_take_for_others_are_refused(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    folder = changed(base, tmp_path, "config.json", change)
    architecture = from_config(json.loads((folder / "config.json").read_text()))
    bits = dict.fromkeys(architecture.linear_shapes(), 4)
    with pytest.raises(ConfigError, match=f"readers of GGUF have no llama model {says}: take compressed-tensors"):
        gguf_keys(folder, architecture, Compact(), bits)


def test_names_of_tensors() -> None:
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.3.self_attn.o_proj.weight": "blk.3.attn_output.weight",
        "model.layers.3.self_attn.q_proj.bias": "blk.3.attn_q.bias",
        "model.layers.3.self_attn.k_norm.weight": "blk.3.attn_k_norm.weight",
        "model.layers.3.post_attention_layernorm.weight": "blk.3.ffn_norm.weight",
    }
    assert {name: gguf_name(name) for name in names} == names


def test_the_plan_refuses_them_and_counts_the_tokenizer(base: Path, tmp_path: Path) -> None:
    options = ("export.integer=[gguf]", "compact.bits=4")
    config = load(save_settings(tmp_path), options)
    files = {stage.name: stage.files for stage in make_plan(config, base).stages}["export"]
    known = know(config, base)
    assert known.gguf_keys["llama.attention.head_count_kv"] == 1
    assert files["gguf/model.gguf"] == gguf_bytes(known.exported_integers("gguf"), known.gguf_keys)
    folder = changed(base, tmp_path, "tokenizer.json", lambda body: body.update(normalizer={"type": "Lowercase"}))
    (folder / "model.safetensors").symlink_to(base / "model.safetensors")
    with pytest.raises(ConfigError, match="the normaliser Lowercase"):
        make_plan(config, folder)

"""A byte-level BPE tokenizer as keys of a GGUF file; needs no torch.

Readers build it anew from its tokens, their kinds, its merges and the name of the way in which text is split. What
these do not say is refused, so that a file never splits text in another way than the model was trained with. One thing
is left to the reader: NFC, which Qwen's tokenizers apply and no reader of GGUF does. Keys: the GGUF specification of
the ggml project; names of splits: llama.cpp.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pipe.errors import ConfigError, SourceError

Keys = dict[str, bool | int | float | str | list[str] | list[int]]
"""Keys of a GGUF file: int is uint32 there, float float32, a list of int an array of int32."""

INSTEAD = "take compressed-tensors for export.integer"

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe", rf"{_WORDS}\p{{N}}{_REST}": "qwen2"}
"""Expressions that text is split by, and the names that llama.cpp and transformers both know them by."""

_GPT2 = "gpt-2"


def array_type(values: list[str] | list[int]) -> type:
    """Of the entries of a value that is a list."""
    return type(values[0])


def tokenizer_keys(folder: Path, vocab: int) -> Keys:
    """The keys of the tokenizer of a model folder, for a model of `vocab` tokens: places without one are unused.

    Raises ConfigError for a tokenizer that readers of GGUF would build otherwise, SourceError for one that is broken.
    """
    body, settings = _read(folder / "tokenizer.json"), _read(folder / "tokenizer_config.json", missing={})
    try:
        split, model = _checked(folder, body), body["model"]
        tokens, kinds = _tokens(folder, body, vocab)
        ids = {token: index for index, token in enumerate(tokens)}
        special = {name: _token(settings.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")}
        unknown = [token for token in special.values() if token is not None and token not in ids]
        if unknown:
            raise _refused(folder, f"the special token {unknown[0]!r}, which it has no number for")
        adds = _added_around(folder, body, special)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise SourceError(f"{folder}/tokenizer.json: expected a tokenizer, found {error!r}; fetch it again") from error
    found: Keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": adds[0],
        "tokenizer.ggml.add_eos_token": adds[1],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = special[name]
        if token is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    template = _template(folder, settings)
    return found | ({"tokenizer.chat_template": template} if template else {})


def _checked(folder: Path, body: Mapping[str, Any]) -> str:
    """The name of the tokenizer's split; raises ConfigError for all that has no name in GGUF."""
    model, normalizer = body["model"], body.get("normalizer")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise _refused(folder, "another model than byte-level BPE with merges")
    if any(model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")):
        raise _refused(folder, "a BPE with dropout, an unknown token, prefixes or suffixes")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(folder, f"the normaliser {normalizer['type']}")
    split = _split(body.get("pre_tokenizer") or {"type": "none"})
    if split is None:
        raise _refused(folder, "a way to split text that has no name in GGUF")
    # llama.cpp takes whole words before merges with this split, and with no other.
    if bool(model.get("ignore_merges")) != (split == "llama-bpe"):
        takes = "takes" if model.get("ignore_merges") else "does not take"
        raise _refused(folder, f"a BPE that {takes} whole words before merges, split as {split}")
    return split


def _split(step: Mapping[str, Any]) -> str | None:
    """The name of a pre-tokenizer: GPT-2's own, or bytes after a split by one of `SPLITS`."""
    *before, last = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if not before:
        return _GPT2 if last.get("use_regex", True) else None
    plain = len(before) == 1 and before[0]["type"] == "Split" and not last.get("use_regex", True)
    if not plain or before[0]["behavior"] != "Isolated" or before[0].get("invert"):
        return None
    return SPLITS.get(before[0]["pattern"].get("Regex", ""))


def _tokens(folder: Path, body: Mapping[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Token and kind of every number below `vocab`."""
    tokens, kinds = [f"[PAD{index}]" for index in range(vocab)], [_UNUSED] * vocab
    rows = [(index, token, _NORMAL) for token, index in body["model"]["vocab"].items()]
    for added in body.get("added_tokens") or ():
        # Readers see spaces and the like in a token of bytes, which an added one is not.
        if not added["content"].isascii() or not added["content"].isprintable() or " " in added["content"]:
            raise _refused(folder, f"the added token {added['content']!r}, which is not printable ASCII")
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise _refused(folder, f"the added token {added['content']!r}, which takes in what stands beside it")
        rows.append((added["id"], added["content"], _CONTROL if added["special"] else _USER_DEFINED))
    for index, token, kind in rows:
        if index >= vocab:
            raise _refused(folder, f"token {index}, of a model with {vocab}")
        tokens[index], kinds[index] = token, kind
    return tokens, kinds


def _added_around(folder: Path, body: Mapping[str, Any], special: Mapping[str, str | None]) -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text, and its eos behind it."""
    step = body.get("post_processor") or {"type": "none"}
    steps = step["processors"] if step["type"] == "Sequence" else [step]
    template: list[Any] = next(
        (each["single"] for each in steps if each["type"] == "TemplateProcessing"), [{"Sequence": {}}]
    )
    around = [each["SpecialToken"]["id"] if "SpecialToken" in each else None for each in template]
    middle = around.index(None)
    before, after = around[:middle], around[middle + 1 :]
    if before not in ([], [special["bos"]]) or after not in ([], [special["eos"]]):
        raise _refused(folder, f"{before} before a text and {after} behind it, not bos and eos")
    return bool(before), bool(after)


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template; of several the one called default."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    found = settings.get("chat_template")
    if isinstance(found, list):
        return next((each["template"] for each in found if each["name"] == "default"), None)
    return found


def _token(given: str | Mapping[str, Any] | None) -> str | None:
    return given["content"] if isinstance(given, Mapping) else given


def _read(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise _refused(path.parent, "no tokenizer.json") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: expected JSON, found {error}; fetch the file again") from error
    if not isinstance(found, dict):
        raise SourceError(f"{path}: expected a JSON object; fetch the file again")
    return found


def _refused(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: expected a tokenizer that GGUF can hold, byte-level BPE as GPT-2, Llama 3 and Qwen 2 have it, "
        f"found {what}: {INSTEAD}"
    )

"""stories260K, a Llama that was never quantised, as a Hugging Face folder with samples of its own to read.

The environment names a folder with stories260K.bin and tok512.bin (llama2.c, version 0 of its format) in
QLORA_PIPE_STORIES260K. The text is what the model itself says at temperature 1, story after story, seeded: on it no
model is better than the unquantised one, in expectation, so that a perplexity above its own is what quantisation cost.
"""

import json
import os
import shutil
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_pipe.sources import cache_folder

SAMPLES = "samples.txt"
_ENVIRONMENT = "QLORA_PIPE_STORIES260K"
_BOS = 1
_STREAMS, _TOKENS = 256, 512


def converted() -> Path:
    """The Hugging Face folder, made once."""
    target = cache_folder() / "stories260k"
    if target.exists():
        return target
    given = os.environ.get(_ENVIRONMENT)
    if not given:
        raise SystemExit(f"set {_ENVIRONMENT} to a folder with stories260K.bin and tok512.bin")
    place = target.with_suffix(".tmp")
    shutil.rmtree(place, ignore_errors=True)
    model = read_model(Path(given) / "stories260K.bin")
    model.save_pretrained(place)
    tokenizer = read_tokenizer(Path(given) / "tok512.bin", model.config.vocab_size)
    tokenizer.save_pretrained(place)
    (place / SAMPLES).write_text("\n".join(stories(model, tokenizer)) + "\n", encoding="utf-8")
    place.rename(target)
    return target


def read_model(path: Path) -> LlamaForCausalLM:
    """From seven int32 and fp32 tensors in a fixed order; two rotary tables at the end are not used."""
    raw = path.read_bytes()
    dim, ffn, layers, heads, kv_heads, vocabulary, length = struct.unpack("<7i", raw[:28])
    flat, at = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(torch.tensor(shape).prod())
        at += size
        return flat[at - size : at].view(shape).clone()

    kv = dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    for name, shape in (
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv, dim)),
        ("self_attn.v_proj", (kv, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (ffn, dim)),
        ("mlp.down_proj", (dim, ffn)),
        ("mlp.up_proj", (ffn, dim)),
    ):
        for layer, tensor in enumerate(take(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                tensor = _halves(tensor, dim // heads)
            state[f"model.layers.{layer}.{name}.weight"] = tensor
    state["model.norm.weight"] = take(dim)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=_BOS,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: Tensor, head: int) -> Tensor:
    """Rotary pairs from neighbours to the two halves of a head."""
    return weight.view(-1, head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """From the pieces and their scores: two neighbours merge into the piece of the highest score first."""
    raw, at = path.read_bytes(), 4
    pieces, scores = [], []
    for _ in range(vocabulary):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + size].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    pieces[:3] = "<unk>", "<s>", "</s>"
    index = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    for number in sorted(range(3, len(pieces)), key=lambda number: -scores[number]):
        piece = pieces[number]
        if not piece.startswith("<0x"):
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += sorted((pair for pair in splits if index.keys() >= set(pair)), key=lambda p: (index[p[0]], p))
    core = Tokenizer(models.BPE(vocab=index, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", _BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@torch.no_grad()
def stories(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> list[str]:
    """What the model says at temperature 1 in so many streams; the last story of a stream is cut off."""
    generator = torch.Generator().manual_seed(seed)
    said, cache = torch.full((_STREAMS, 1), _BOS), None
    for _ in range(_TOKENS - 1):
        output = model(input_ids=said[:, -1:], past_key_values=cache, use_cache=True)
        chances, cache = output.logits[:, -1].softmax(dim=-1), output.past_key_values
        said = torch.cat([said, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return [line for stream in said.tolist() for line in _told(tokenizer, stream)]


def _told(tokenizer: PreTrainedTokenizerFast, stream: list[int]) -> list[str]:
    starts = [number for number, token in enumerate(stream) if token == _BOS]
    parts = [stream[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(stream)], strict=True)]
    return [text for text in (tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts) if text]


if __name__ == "__main__":
    folder = converted()
    print(json.dumps({"folder": str(folder), "characters": len((folder / SAMPLES).read_text(encoding="utf-8"))}))

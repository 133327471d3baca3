"""A whole training step of L4Q beside PEFT's LoRA and QLoRA on bitsandbytes: seconds and peak bytes, on any device.

    python benchmarks/gpu_l4q.py [--short] [--json FILE] [--device cuda|cpu] [--shape smollm2-135m|wide|llama-3.2-1b|
        llama-3.1-8b] [--tokens 512] [--rank 16] [--group_size 64]

Default device: CUDA if there is one. A step is forward, backward and AdamW on one row of so many tokens, adapters on
every linear map of the blocks, through the summed loss of training, which never holds all logits. Compute is bf16 with
fp32 adapters and steps, on the CPU fp32 throughout. Weights are random: neither time nor memory asks for their values,
but for the share that clips. Peak bytes count the model and the optimiser: on CUDA what its allocator says, on the CPU
all tensors alive at once. QLoRA is NF4 with double quantisation. Seconds are medians of steps that take turns.
"""

import argparse
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import rows
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from l4q_step import LiveBytes, paired, sizes
from peft import LoraConfig, inject_adapter_in_model
from rows import Row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_pipe.hf.loss import summed_loss
from quant.fakequant import L4QLinear
from quant.start import first_codes, packed_into_cells

SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "wide": (4096, 2048, 5632, 2, 32, 8),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8),
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8),
}
"""Vocabulary, hidden and feed-forward widths, layers, heads, KV heads; `wide` has little but two wide layers."""
TIME, BYTES = 1.6, 1.1
Replace = Callable[[nn.Linear], nn.Module]


def model_of(arguments: argparse.Namespace, replace: Replace | None) -> LlamaForCausalLM:
    """A model of that shape whose linear maps in blocks are replaced, or given PEFT's adapters."""
    vocabulary, hidden, ffn, layers, heads, kv_heads = SHAPES[arguments.shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(arguments.dtype).requires_grad_(False)
    for name, module in list(model.model.layers.named_modules()):
        if replace is not None and isinstance(module, nn.Linear):
            model.model.layers.set_submodule(name, replace(module))
    return model


def with_lora(arguments: argparse.Namespace, replace: Replace | None = None) -> LlamaForCausalLM:
    rank = arguments.rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    return inject_adapter_in_model(config, model_of(arguments, replace))


def nf4(arguments: argparse.Namespace) -> Replace:
    def replace(module: nn.Linear) -> nn.Module:
        sides = (module.in_features, module.out_features)
        made = Linear4bit(*sides, bias=False, compute_dtype=arguments.dtype, compress_statistics=True, quant_type="nf4")
        weight = module.weight.data.cpu()
        made.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
        return made.to(arguments.device)

    return replace


def l4q(arguments: argparse.Namespace, bits: int, packed_bits: int | None) -> Replace:
    """L4Q with the frozen weight in the compute dtype, or packed."""
    generator = torch.Generator().manual_seed(0)
    kind = "half" if bits == 2 else "zero"

    def replace(module: nn.Linear) -> nn.Module:
        weight: Tensor = module.weight.data
        codes, scale, offset = first_codes(weight.float(), bits, arguments.group_size, method="mse", offset=kind)
        frozen = weight
        if packed_bits is not None:
            frozen = packed_into_cells(
                weight.float(), codes, scale, bits=bits, half=kind == "half", packed_bits=packed_bits
            )
        made = L4QLinear(
            frozen,
            None,
            bits=bits,
            group_size=arguments.group_size,
            rank=arguments.rank,
            alpha=2.0,
            generator=generator,
            offset=kind,
            steps=(scale, offset),
        )
        for parameter in (made.lora_a, made.lora_b, made.scale):
            parameter.requires_grad_()
        return made

    return replace


def stepper(arguments: argparse.Namespace, model: LlamaForCausalLM) -> Callable[[], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.arange(arguments.tokens, device=arguments.device)[None] % SHAPES[arguments.shape][0]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def run() -> None:
        summed_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device != "cpu":
            torch.cuda.synchronize()

    return run


def peak_bytes(arguments: argparse.Namespace, model: LlamaForCausalLM, run: Callable[[], None], others: int) -> int:
    """Of one step, after the optimiser has made its moments; `others` bytes are not this model's."""
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - others
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with LiveBytes(held) as live:
        run()
    return sum(held.values()) + 2 * trained + live.peak


def prepared(arguments: argparse.Namespace, make: Callable[[], LlamaForCausalLM]) -> tuple[Callable[[], None], int]:
    """A step of a model that has made one, and the peak of the next."""
    others = torch.cuda.memory_allocated() if arguments.device != "cpu" else 0
    model = make()
    run = stepper(arguments, model)
    run()
    return run, peak_bytes(arguments, model, run, others)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """L4Q in its forms beside both peers; one peer and one of ours are in memory at a time."""
    repeats = 3 if arguments.short else 9
    forms = {"4 bits, dense": (4, None), "4 bits, base int8": (4, 8), "2 bits, base int4": (2, 4)}
    peers = {"PEFT LoRA": None, "QLoRA (bitsandbytes NF4)": nf4(arguments)}
    for peer, replace in peers.items():
        for form, (bits, packed_bits) in forms.items():
            theirs, other_bytes = prepared(arguments, partial(with_lora, arguments, replace))
            ours, own_bytes = prepared(arguments, partial(model_of, arguments, l4q(arguments, bits, packed_bits)))
            plain = peer == "PEFT LoRA"
            name = f"{arguments.shape}, {arguments.device}, {arguments.tokens} tokens: L4Q {form} / {peer}"
            dense = plain and packed_bits is None
            yield paired(f"{name}, step seconds", ours, theirs, TIME if dense else None, repeats)
            bar = BYTES if dense else 1.0 if packed_bits and not plain else None
            yield sizes(f"{name}, peak bytes", own_bytes, other_bytes, bar)
            del theirs, ours
            gc.collect()


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    options = rows.parser("A training step of L4Q beside PEFT's LoRA and QLoRA.")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    options.add_argument("--tokens", type=int, default=512, metavar="N")
    options.add_argument("--rank", type=int, default=16, metavar="N")
    options.add_argument("--group_size", type=int, default=64, metavar="N")
    given = options.parse_args()
    given.dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
    rows.show(measure(given), given.json)

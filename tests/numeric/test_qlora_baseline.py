"""The QLoRA baseline: transformers with bitsandbytes NF4 beside our NF4 with one level of scales.

bitsandbytes cuts the flattened weight into blocks; where the block size divides the inputs these are our blocks.
Weights agree to 1e-4 of a block's scale (bitsandbytes' own NF4 table differs from the exact quantiles by as much),
logits to 1e-3 of the largest.
"""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from tiny import save_tiny_model
from tiny_models import TinyFolder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_pipe.hf.model import dense_linear
from quant.blockwise import dequantize
from quant.codebook import encode, normal_float

BLOCK = 64
IDS = torch.arange(2 * 30).reshape(2, 30) * 13 % 256


def ours(weight: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 with fp32 scales, rebuilt, and the scale of each weight."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    codes = encode(blocks / scale, normal_float(4)).view(weight.shape)
    rebuilt = dequantize(codes, scale.view(len(weight), -1), normal_float(4))
    return rebuilt, scale.expand_as(blocks).reshape(weight.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    # In evaluation mode bitsandbytes repacks the codes for some CPUs and multiplies in bfloat16 whatever was asked for.
    return model.train()


def test_dequantised_weights_are_those_of_bitsandbytes(folder: Path, theirs: PreTrainedModel) -> None:
    tiny, count = TinyFolder(folder), 0
    for _, role, name in tiny.architecture.linears():
        module = theirs.get_submodule(name)
        assert isinstance(module, bnb.nn.Linear4bit)
        state = module.weight.quant_state
        assert state.blocksize == BLOCK
        assert not state.nested
        expected = bnb.functional.dequantize_4bit(module.weight.data, state)
        found, scale = ours(tiny.weight(role, name)[0])
        assert ((found - expected).abs() / scale).max() < 1e-4, name
        count += 1
    assert count == 14


def test_logits_are_those_of_bitsandbytes(folder: Path, theirs: PreTrainedModel) -> None:
    tiny = TinyFolder(folder)

    def linear(layer: int, role: str, name: str) -> nn.Module:
        weight, bias = tiny.weight(role, name)
        return dense_linear(ours(weight)[0], bias)

    with torch.no_grad():
        found, expected, base = (model(input_ids=IDS).logits for model in (tiny.build(linear), theirs, tiny.dense()))
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * largest)
    assert (expected - base).abs().max() > 1e-2 * largest, "quantisation shows"

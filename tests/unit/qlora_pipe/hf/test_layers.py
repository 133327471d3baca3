"""A model run layer by layer from disk against the whole one; how much of it lives at one time."""

from pathlib import Path

import pytest
import torch
from pipeline.test_chain import FAMILIES
from tiny import save_tiny_model
from tiny_models import LiveWeights, TinyFolder, byte_rows

from qlora_pipe.errors import SourceError
from qlora_pipe.hf.layers import LayerStream
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.sequences import collate

BATCH = collate(byte_rows(["forty bytes of calibration text, surely so", "another row of forty bytes of text, surely"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_in_turn_are_the_model_bit_for_bit(family: str, tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path, family.partition("-")[0], num_hidden_layers=8, **FAMILIES[family]))
    stream, model = tiny.stream(), tiny.dense()
    with torch.no_grad():
        start = stream.start(BATCH)
        hidden = start.hidden
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                assert not layer.training
                assert layer.self_attn.layer_idx == index
                hidden = layer(hidden, **start.arguments[index])
        assert len(stream) == 8
        assert torch.equal(stream.loss(hidden, BATCH), summed_loss(model, BATCH))


def test_the_loss_reaches_the_hidden_states(tmp_path: Path) -> None:
    stream = TinyFolder(save_tiny_model(tmp_path)).stream()
    hidden = stream.start(BATCH).hidden.requires_grad_()
    stream.loss(hidden, BATCH).backward()
    assert hidden.grad is not None
    assert hidden.grad[:, :-1].abs().sum(dim=-1).min() > 0
    assert not hidden.grad[:, -1].any()


def test_a_layer_is_gone_after_its_turn(tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path, num_hidden_layers=5))
    live = LiveWeights(tiny)
    stream = live.stream()
    kept = []
    for index in (0, 1, 4, 0):
        with stream.layer(index) as layer:
            assert sum(parameter.numel() for parameter in layer.parameters()) == live.layer_size
            assert live.now() == {index}
        kept.append(layer)
        assert live.now() == set()
    assert live.most == 1


def test_a_parameter_nobody_describes_is_an_error(tmp_path: Path) -> None:
    tiny = TinyFolder(save_tiny_model(tmp_path, "qwen3"))
    other = TinyFolder(save_tiny_model(tmp_path / "llama"))
    stream = LayerStream(tiny.config, other.architecture, tiny.stream()._linear, tiny.reader.read_float, device="cpu")
    with pytest.raises(SourceError, match=r"parameter self_attn\.q_norm\.weight of Qwen3DecoderLayer is not in"):
        stream.layer(0).__enter__()

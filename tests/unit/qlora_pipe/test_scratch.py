"""Tensors put aside on disk come back as they were, and leave nothing behind."""

from pathlib import Path

import pytest
import torch

from qlora_pipe.artifacts.scratch import Scratch


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, generator=generator),
        ("b", 1): torch.randn(2, 1, 7, generator=generator).to(torch.bfloat16),
        "turned": torch.randn(4, 6, generator=generator).T,
    }
    with Scratch(tmp_path) as scratch:
        for key, tensor in tensors.items():
            scratch.write(key, tensor)
        for key, tensor in tensors.items():
            found = scratch.read(key)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)


def test_a_key_keeps_its_place(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        for value in range(5):
            scratch.write(0, torch.full((10,), value))
            scratch.write(1, torch.full((10,), -value))
        assert scratch.nbytes == 2 * 80
        assert scratch.read(0).tolist() == [4] * 10
        assert scratch.read(1).tolist() == [-4] * 10


def test_what_is_read_is_a_copy(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        scratch.write(0, torch.ones(3))
        scratch.read(0).zero_()
        assert scratch.read(0).tolist() == [1, 1, 1]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        scratch.write(0, torch.ones(3))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        scratch.read(0)

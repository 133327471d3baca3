"""Tensors put aside on disk during one stage."""

import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class Scratch:
    """Tensors by key in one file without a name, which is gone when it is closed or the process is killed.

    A key keeps its place: a second tensor under it has the bytes of the first. Peak bytes: one tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 -- closed by __exit__
        self._places: dict[Hashable, tuple[int, torch.dtype, torch.Size]] = {}
        self.nbytes = 0

    def write(self, key: Hashable, tensor: Tensor) -> None:
        """Put a tensor aside, in the place of the last one of that key."""
        if key not in self._places:
            self._places[key] = (self.nbytes, tensor.dtype, tensor.shape)
            self.nbytes += tensor.nbytes
        offset, dtype, shape = self._places[key]
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        self._file.seek(offset)
        left = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        while left:
            left = left[self._file.write(left) :]

    def read(self, key: Hashable, device: torch.device | str = "cpu") -> Tensor:
        """The tensor of that key, in memory of its own."""
        offset, dtype, shape = self._places[key]
        buffer = bytearray(dtype.itemsize * shape.numel())
        self._file.seek(offset)
        left = memoryview(buffer)
        while left:
            left = left[self._file.readinto(left) :]
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape).to(device)

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

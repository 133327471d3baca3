"""Streaming tensors to and from disk, one at a time; never memory-mapped, so that peak memory is what is asked for."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from qlora_pipe.artifacts.headers import Location, read_folder
from qlora_pipe.artifacts.layout import DTYPE_CODE, SHARD_BYTES, Layout, header, index_json, shards
from qlora_pipe.errors import PlanError, SourceError, WeightError

_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def dtype_code(dtype: torch.dtype) -> str:
    """safetensors code of a torch dtype; the dtype's own name if no file here holds it."""
    name = str(dtype).removeprefix("torch.")
    return DTYPE_CODE.get(name, name)


def torch_dtype_of(code: str) -> torch.dtype:
    """torch dtype of a safetensors code."""
    return _TORCH[code]


class TensorReader:
    """The tensors of a folder, read on demand. Peak bytes: one tensor."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.folder = folder
        self.locations: dict[str, Location] = read_folder(folder, stem)

    def __contains__(self, name: str) -> bool:
        return name in self.locations

    def __iter__(self) -> Iterator[str]:
        return iter(self.locations)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, in memory of its own; raises SourceError if it is missing or cut short."""
        try:
            place = self.locations[name]
        except KeyError:
            raise SourceError(f"{self.folder}: expected a tensor {name}, found none of that name") from None
        buffer = bytearray(place.spec.nbytes)
        with place.file.open("rb", buffering=0) as stream:
            stream.seek(place.offset)
            done = 0
            while done < len(buffer):
                count = stream.readinto(memoryview(buffer)[done:])
                if not count:
                    raise SourceError(f"{place.file}: truncated inside tensor {name}; fetch the file again")
                done += count
        if not buffer:
            return torch.empty(place.spec.shape, dtype=_TORCH[place.spec.dtype])
        return torch.frombuffer(buffer, dtype=_TORCH[place.spec.dtype]).reshape(place.spec.shape)

    def read_float(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor as finite floats of `dtype`; raises WeightError if it is not floating or holds NaN or Inf."""
        tensor = self.read(name)
        if not tensor.is_floating_point():
            raise WeightError(
                f"{self.folder}: tensor {name} has dtype {tensor.dtype}, expected floating point; "
                "give the unquantised checkpoint"
            )
        # The extremes carry NaN and Inf and, unlike isfinite, take no memory.
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightError(f"{self.folder}: tensor {name} holds {bad} NaN or Inf of {tensor.numel()} values")
        return tensor.to(dtype)


class TensorWriter:
    """Writes exactly the tensors of a layout, in any order. Peak bytes: one tensor.

    Close it (or leave the `with` block) to fsync; raises PlanError on anything that differs from the layout.
    """

    def __init__(self, folder: Path, layout: Layout, *, stem: str = "model", limit: int = SHARD_BYTES) -> None:
        split = shards(layout, limit, stem)
        self._missing = set(layout)
        self._places: dict[str, Location] = {}
        for file, part in split.items():
            head = header(part)
            (folder / file).write_bytes(head)
            offset = len(head)
            for name, spec in part.items():
                self._places[name] = Location(folder / file, offset, spec)
                offset += spec.nbytes
            os.truncate(folder / file, offset)
        self._streams = {folder / file: (folder / file).open("r+b") for file in split}
        if len(split) > 1:
            (folder / f"{stem}.safetensors.index.json").write_bytes(index_json(split))

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor where the layout says; dtype and shape must be the planned ones."""
        if name not in self._missing:
            raise PlanError(f"tensor {name} is not planned, or was written twice; this is a defect of the stage")
        place = self._places[name]
        found = (dtype_code(tensor.dtype), tuple(tensor.shape))
        if found != (place.spec.dtype, place.spec.shape):
            raise PlanError(f"tensor {name}: planned {place.spec}, found {found}; this is a defect of the stage")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        stream = self._streams[place.file]
        stream.seek(place.offset)
        if flat.numel():
            stream.write(flat.view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def missing(self) -> list[str]:
        """Planned tensors that are not written yet, in the layout's order."""
        return [name for name in self._places if name in self._missing]

    def close(self) -> None:
        """Flush and fsync every file; raises PlanError naming a planned tensor that was never written."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
        if self._missing:
            raise PlanError(f"{len(self._missing)} planned tensors were not written, first {min(self._missing)}")

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for stream in self._streams.values():
                stream.close()

"""Reading safetensors headers without a weight and without torch; every defect is a typed error."""

import json
from dataclasses import dataclass
from pathlib import Path

from qlora_pipe.artifacts.layout import DTYPE_BYTES, TensorSpec
from qlora_pipe.errors import SourceError, WeightError

_HEADER_LIMIT = 100 * 2**20
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    spec: TensorSpec


def read_header(file: Path) -> dict[str, Location]:
    """Every tensor of one safetensors file; raises SourceError if it is missing, truncated or malformed."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise SourceError(
                    f"{file}: expected a safetensors file, found a header of {length} bytes in a file of {size}; "
                    "the file is truncated or of another format, fetch it again"
                )
            entries = json.loads(stream.read(length))
    except OSError as error:
        raise SourceError(f"{file}: expected a readable safetensors file, found {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: expected a JSON header, found {error}; fetch the file again") from error
    start = 8 + length
    try:
        entries.pop("__metadata__", None)
        found = {name: _location(file, start, name, entry) for name, entry in entries.items()}
    except _MALFORMED as error:
        raise SourceError(f"{file}: the header is not a safetensors header ({error}); fetch it again") from error
    end = max((place.offset + place.spec.nbytes for place in found.values()), default=start)
    if end > size:
        raise SourceError(f"{file}: truncated: expected {end} bytes, found {size}; fetch the file again")
    return found


def _location(file: Path, start: int, name: str, entry: dict[str, object]) -> Location:
    begin, end = _counts(entry["data_offsets"])
    shape, dtype = _counts(entry["shape"]), str(entry["dtype"])
    if dtype not in DTYPE_BYTES:
        raise WeightError(f"{file}: tensor {name} has dtype {dtype}; expected one of {', '.join(DTYPE_BYTES)}")
    spec = TensorSpec(dtype, shape)
    if end - begin != spec.nbytes:
        raise ValueError(f"tensor {name} spans bytes {begin}..{end}, its shape {shape} takes {spec.nbytes}")
    return Location(file, start + begin, spec)


def _counts(values: object) -> tuple[int, ...]:
    """A JSON list of sizes, nothing that could be read as one (`"12"`, 1.5, true)."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**63 for value in values):
        raise ValueError(f"expected a list of sizes, found {values!r:.60}")
    return tuple(values)


def read_folder(folder: Path, stem: str = "model") -> dict[str, Location]:
    """Every tensor of a folder with `<stem>.safetensors` or its sharded form; raises SourceError."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise SourceError(
            f"{folder}: expected {single.name} or {index.name}, found neither; "
            "give a folder with safetensors weights (convert .bin checkpoints with transformers first)"
        )
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, *_MALFORMED) as error:
        raise SourceError(f"{index}: expected a weight_map, found {error!r}; fetch the file again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise SourceError(f"{index}: expected plain file names, found {name!r}; the index may not leave its folder")
    found: dict[str, Location] = {}
    for name in names:
        found |= read_header(folder / name)
    missing = [name for name in weight_map if name not in found]
    if missing:
        raise SourceError(f"{index}: tensor {missing[0]} is listed but in no file; fetch the checkpoint again")
    return found

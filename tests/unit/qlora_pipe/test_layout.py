import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_pipe.artifacts.layout import TensorSpec, entry_bytes, file_bytes, folder_files, header, index_json, shards
from qlora_pipe.artifacts.tensors import TensorWriter, torch_dtype_of

# Wide dtypes first and names in order: how safetensors itself lays a file out.
MIXED = {
    "a.weight": TensorSpec("F32", (7, 129)),
    "b.scalar": TensorSpec("F32", ()),
    "c.codes": TensorSpec("I32", (64, 1000)),
    "d.half": TensorSpec("BF16", (3, 5)),
    "e.empty": TensorSpec("BF16", (4, 0)),
    "f.bytes": TensorSpec("U8", (11,)),
}
ODD_NAMES = {"with space": TensorSpec("F32", (1,)), 'x"quoted"\\': TensorSpec("F32", (2,))}


@pytest.mark.parametrize("layout", [{}, MIXED, dict(list(MIXED.items())[:1]), ODD_NAMES], ids=len)
def test_file_bytes_are_those_of_safetensors(layout: dict[str, TensorSpec], tmp_path: Path) -> None:
    tensors = {name: torch.zeros(spec.shape, dtype=torch_dtype_of(spec.dtype)) for name, spec in layout.items()}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert file_bytes(layout) == len(theirs)
    assert theirs.startswith(header(layout))


def test_elements_and_bytes() -> None:
    assert (TensorSpec("BF16", (3, 5)).elements, TensorSpec("BF16", (3, 5)).nbytes) == (15, 30)
    assert TensorSpec("F64", ()).nbytes == 8
    assert TensorSpec("I16", (4, 0)).nbytes == 0


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(1000, [3]), (12, [3]), (11, [2, 1]), (8, [2, 1]), (7, [1, 1, 1]), (1, [1, 1, 1])],
)
def test_shards_hold_the_limit_unless_one_tensor_exceeds_it(limit: int, sizes: list[int]) -> None:
    layout = {name: TensorSpec("F32", (1,)) for name in "abc"}
    split = shards(layout, limit, "stem")
    assert [len(part) for part in split.values()] == sizes
    assert [name for part in split.values() for name in part] == ["a", "b", "c"]
    if len(sizes) == 1:
        assert list(split) == ["stem.safetensors"]
    else:
        assert next(iter(split)) == f"stem-00001-of-0000{len(sizes)}.safetensors"


def test_folder_files_are_what_the_writer_leaves(tmp_path: Path) -> None:
    layout = {f"t{number}": TensorSpec("F32", (number + 1, 16)) for number in range(9)}
    with TensorWriter(tmp_path, layout, limit=700) as writer:
        for name, spec in layout.items():
            writer.write(name, torch.ones(spec.shape))
    found = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(found) > 3
    assert found == folder_files(layout, limit=700)


def test_the_index_names_every_tensor_and_the_total() -> None:
    split = shards({name: TensorSpec("F32", (2,)) for name in "ab"}, 8)
    index = json.loads(index_json(split))
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 16


@pytest.mark.parametrize("limit", [10**9, 1])
def test_longer_entries_are_counted_in_header_and_index(limit: int) -> None:
    short = {f"t{n}": TensorSpec("F32", (n + 1,)) for n in range(9)}
    long = {f"t{n}{'x' * 300}": TensorSpec("BF16", (n + 1, 123)) for n in range(9)}
    real, most = (
        grown(long) - grown(short)
        for grown in (lambda layout: sum(folder_files(layout, limit).values()) - _bytes(layout), entry_bytes)
    )
    # Real offsets differ by their digits, 2 x 20 a tensor at most, and headers are padded to 8 bytes.
    assert real <= most + 9 * (40 + 8)
    # One file has no index.
    assert real >= most // (1 if limit == 1 else 2) - 9 * 8


def _bytes(layout: dict[str, TensorSpec]) -> int:
    return sum(spec.nbytes for spec in layout.values())

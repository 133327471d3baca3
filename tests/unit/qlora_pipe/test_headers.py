import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.artifacts.headers import read_folder, read_header
from qlora_pipe.artifacts.layout import TensorSpec, header, index_json, shards
from qlora_pipe.errors import SourceError, WeightError

LAYOUT = {"a": TensorSpec("F32", (2, 3)), "b": TensorSpec("U8", (5,)), "c": TensorSpec("BF16", (4, 0))}


def save(path: Path, head: Any, body: bytes = b"") -> Path:
    """A file with this JSON value (or these bytes) as its header."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(LAYOUT) + bytes(29))
    return path


def test_a_whole_file(whole: Path) -> None:
    found = read_header(whole)
    assert {name: place.spec for name, place in found.items()} == LAYOUT
    start = len(header(LAYOUT))
    assert [place.offset - start for place in found.values()] == [0, 24, 29]
    assert {place.file for place in found.values()} == {whole}


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_every_truncation_is_seen(whole: Path, keep: int) -> None:
    whole.write_bytes(whole.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"model.safetensors: (truncated|expected a safetensors file)"):
        read_header(whole)


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 1000])
def test_a_header_longer_than_the_file(whole: Path, length: int) -> None:
    whole.write_bytes(length.to_bytes(8, "little") + whole.read_bytes()[8:])
    with pytest.raises(SourceError, match=f"a header of {length} bytes"):
        read_header(whole)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"{not json", "expected a JSON header"),
        (b"\xff\xfe\xff\xff", "expected a JSON header"),
        pytest.param(b"[" * 200_000, "expected a JSON header", id="deep"),
        ([], "not a safetensors header"),
        (7, "not a safetensors header"),
        ({"x": 1}, "not a safetensors header"),
        ({"x": {}}, "not a safetensors header"),
        (entry(shape=[3]), "spans bytes 0..8, its shape"),
        (entry(shape=[-2]), "expected a list of sizes"),
        (entry(shape=[-1, -2]), "expected a list of sizes"),
        (entry(shape="2"), "expected a list of sizes"),
        (entry(shape=[2.5]), "expected a list of sizes"),
        (entry(shape=[True, 2]), "expected a list of sizes"),
        (entry(shape=[10**30, 0]), "expected a list of sizes"),
        (entry(data_offsets=[0, float("inf")]), "expected a list of sizes"),
        (entry(data_offsets=[-8, 0]), "expected a list of sizes"),
        (entry(data_offsets=[8, 0]), "spans bytes 8..0"),
        (entry(data_offsets=[0, 4, 8]), "not a safetensors header"),
        (entry(data_offsets=[8, 16]), "truncated: expected"),
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path: Path, head: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read_header(save(tmp_path / "x.safetensors", head, bytes(8)))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"tensor x has dtype F8_E4M3; expected one of F64"):
        read_header(save(tmp_path / "x.safetensors", entry(dtype="F8_E4M3"), bytes(8)))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        read_header(tmp_path / "gone.safetensors")
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(SourceError, match="Is a directory"):
        read_folder(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    split = shards(LAYOUT, 24)
    for name, part in split.items():
        (tmp_path / name).write_bytes(header(part) + bytes(sum(spec.nbytes for spec in part.values())))
    (tmp_path / "model.safetensors.index.json").write_bytes(index_json(split))
    return tmp_path


def rewrite_map(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    body = json.loads(path.read_text())
    change(body["weight_map"])
    path.write_text(json.dumps(body))


def test_a_sharded_folder(sharded: Path) -> None:
    found = read_folder(sharded)
    assert {name: place.spec for name, place in found.items()} == LAYOUT
    assert len({place.file for place in found.values()}) == 2


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match="model-00002-of-00002"):
        read_folder(sharded)


def test_a_listed_tensor_that_is_in_no_file(sharded: Path) -> None:
    rewrite_map(sharded, lambda places: places.update(ghost="model-00001-of-00002.safetensors"))
    with pytest.raises(SourceError, match="tensor ghost is listed but in no file"):
        read_folder(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", ".", "..", "", 7, None])
def test_the_index_cannot_leave_its_folder(sharded: Path, name: Any) -> None:
    (sharded.parent / "secret.safetensors").write_bytes(header({"stolen": TensorSpec("F32", ())}) + bytes(4))
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"stolen": name}}))
    with pytest.raises(SourceError, match=r"the index may not leave its folder|Is a directory"):
        read_folder(sharded)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}', pytest.param("[" * 200_000, id="deep")],
)
def test_a_malformed_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match="expected a weight_map"):
        read_folder(tmp_path)


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(SourceError, match="expected a weight_map"):
        read_folder(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected model.safetensors or .*found neither"):
        read_folder(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["F32", "U8"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def readable_or_refused(path: Path) -> None:
    """A file gives a dictionary whose tensors lie inside it, or a typed error: nothing else."""
    try:
        found = read_header(path)
    except SourceError:
        return
    size = path.stat().st_size
    for place in found.values():
        assert 8 <= place.offset <= place.offset + place.spec.nbytes <= size


@given(data=st.binary(max_size=200))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    readable_or_refused(path)


@given(head=JSON | st.dictionaries(st.text(max_size=3), JSON), body=st.binary(max_size=40))
def test_any_json_as_header(tmp_path_factory: pytest.TempPathFactory, head: Any, body: bytes) -> None:
    readable_or_refused(save(tmp_path_factory.getbasetemp() / "fuzz.safetensors", head, body))


@given(
    shape=st.lists(st.integers(-1, 4) | st.just(2**62), max_size=3),
    offsets=st.lists(st.integers(-2, 40), min_size=2, max_size=2),
    dtype=st.sampled_from(["F32", "U8", "I64"]),
)
def test_almost_valid_entries(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], offsets: list[int], dtype: str
) -> None:
    head = {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    readable_or_refused(save(tmp_path_factory.getbasetemp() / "fuzz.safetensors", head, bytes(32)))


@given(place=st.integers(0, 200), value=st.integers(0, 255))
def test_any_changed_byte(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    data = bytearray(header(LAYOUT) + bytes(29))
    data[place % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    readable_or_refused(path)

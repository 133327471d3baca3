import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_pipe.errors import SourceError, UnsupportedModel
from qlora_pipe.gguf_header import gguf_config, read_gguf
from qlora_pipe.sources import architecture_of, find_model

VOCABULARY = [f"token {number}" for number in range(40)]
PARTS = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
PARTS |= {"ffn_gate": (192, 64), "ffn_up": (192, 64), "ffn_down": (64, 192)}
FURTHER = {
    "qwen2": {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)},
    "qwen3": {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)},
    "gemma2": {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)},
}
FURTHER["gemma3"] = FURTHER["qwen3"] | FURTHER["gemma2"]
KINDS = ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"]


def shapes(kind: str, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small model's tensors, as llama.cpp names them."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(VOCABULARY), 64), "output_norm.weight": (64,)}
    for layer in range(layers):
        parts: dict[str, tuple[int, ...]] = {f"{part}.weight": shape for part, shape in PARTS.items()}
        parts |= {"attn_norm.weight": (64,), "ffn_norm.weight": (64,)} | FURTHER.get(kind, {})
        found |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    return found


def write(
    path: Path,
    kind: str = "llama",
    tensors: dict[str, tuple[int, ...]] | None = None,
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    vocabulary: bool = True,
) -> Path:
    """A GGUF file from the reference writer."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name("tiny")
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(192)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_bool("tiny.flag", True)
    if vocabulary:
        writer.add_token_list(VOCABULARY)
        writer.add_token_scores([0.0] * len(VOCABULARY))
    keys(writer)
    for name, shape in (shapes(kind) if tensors is None else tensors).items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_reference_reader_sees_the_same(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "m.gguf", kind)
    theirs = gguf.GGUFReader(path)
    keys, names = read_gguf(path)
    assert names == [tensor.name for tensor in theirs.tensors]
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(keys) == set(fields)
    for name, field in fields.items():
        value = field.contents()
        assert keys[name] == (len(value) if isinstance(value, list) else value)


def test_the_architecture_has_the_shapes_of_the_file(tmp_path: Path, kind: str) -> None:
    architecture = architecture_of(find_model(str(write(tmp_path / "m.gguf", kind))))
    assert architecture.model_type == {"gemma3": "gemma3_text"}.get(kind, kind)
    assert architecture.tied
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = sorted(tuple(reversed(tensor.shape.tolist())) for tensor in theirs.tensors)
    assert sorted(architecture.tensors().values()) == expected


def test_a_head_of_its_own(tmp_path: Path) -> None:
    tensors = shapes("llama") | {"output.weight": (len(VOCABULARY), 64)}
    assert not architecture_of(find_model(str(write(tmp_path / "m.gguf", tensors=tensors)))).tied


def test_the_vocabulary_may_be_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys=lambda writer: writer.add_vocab_size(123), vocabulary=False)
    assert architecture_of(find_model(str(path))).vocab == 123
    path = write(tmp_path / "n.gguf", vocabulary=False)
    with pytest.raises(UnsupportedModel, match="expected sizes as numbers"):
        architecture_of(find_model(str(path)))


@pytest.mark.parametrize(
    "odd",
    [
        "blk.0.ffn_gate_inp.weight",
        "blk.1.attn_q.bias",
        "rope_freqs.weight",
        "blk.2.attn_q.weight",
        "blk.0.ffn_up.scale",
    ],
)
def test_tensors_that_a_conversion_would_drop_are_refused(tmp_path: Path, odd: str) -> None:
    path = write(tmp_path / "m.gguf", tensors=shapes("llama") | {odd: (64,)})
    with pytest.raises(UnsupportedModel, match=f"1 tensors that .* first {odd}"):
        gguf_config(path)


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "blk.0.attn_v.bias", "token_embd.weight"])
def test_tensors_that_a_conversion_would_invent_are_refused(tmp_path: Path, name: str) -> None:
    tensors = {other: shape for other, shape in shapes("qwen2").items() if other != name}
    with pytest.raises(UnsupportedModel, match=f"no tensor {name}, which a qwen2 model has"):
        gguf_config(write(tmp_path / "m.gguf", "qwen2", tensors))


def test_sizes_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", keys=lambda writer: writer.add_head_count_kv([2, 1]))
    with pytest.raises(UnsupportedModel, match="num_key_value_heads differs by layer"):
        gguf_config(path)


@pytest.mark.parametrize("kind", ["mamba", "qwen2moe"])
def test_another_architecture_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"GGUF architecture '{kind}'; expected one of llama"):
        gguf_config(write(tmp_path / "m.gguf", kind))


def head(tensors: int = 0, keys: int = 0, *, magic: bytes = b"GGUF", version: int = 3, rest: bytes = b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + rest


def pair(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends inside its header"),
        (b"GG", "ends inside its header"),
        (head(magic=b"GGML"), "no GGUF magic"),
        (head(version=1), "GGUF version 1, expected 2 or 3"),
        (head(version=3 << 24), "expected 2 or 3"),
        (head(tensors=2**63), "tensors and 0 keys"),
        (head(keys=2**63), "keys; fetch"),
        (head(keys=2**20), "ends inside its header"),
        (head(keys=1, rest=struct.pack("<Q", 2**62)), "a string of"),
        (head(keys=1, rest=pair(b"k", 8, struct.pack("<Q", 2**40))), "a string of"),
        (head(keys=1, rest=pair(b"k", 13, b"")), "unknown type 13"),
        (head(keys=1, rest=pair(b"k", 9, struct.pack("<IQ", 4, 2**60))), "an array of"),
        (head(keys=1, rest=pair(b"k", 9, struct.pack("<IQ", 9, 1))), "an array of arrays"),
        (head(keys=1, rest=pair(b"k", 9, struct.pack("<IQQ", 8, 2, 2**50))), "a string of"),
        (head(keys=1, rest=pair(b"k", 9, struct.pack("<IQQ", 8, 2**24, 0))), "ends inside its header"),
        (head(tensors=1, rest=struct.pack("<QI", 0, 2**32 - 1)), "a tensor of 4294967295 dimensions"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_gguf(tmp_path / "m.gguf")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.gguf"):
        with pytest.raises(SourceError, match="expected a readable GGUF file"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("embedding_length", 12, struct.pack("<d", float("inf"))),
        ("embedding_length", 12, struct.pack("<d", float("nan"))),
        ("embedding_length", 8, struct.pack("<Q", 4) + b"wide"),
        ("block_count", 12, struct.pack("<d", 2.0)),
        ("block_count", 10, struct.pack("<Q", 2**64 - 1)),
        ("attention.head_count", 4, struct.pack("<I", 0)),
        ("attention.head_count_kv", 4, struct.pack("<I", 3)),
    ],
)
def test_sizes_that_are_no_sizes(tmp_path: Path, name: str, kind: int, value: bytes) -> None:
    """A later key wins, so a bad one is put behind the good ones."""
    path = write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    (keys,) = struct.unpack_from("<Q", data, 16)
    struct.pack_into("<Q", data, 16, keys + 1)
    # Behind the last key is the first tensor's name, with its length before it.
    place = data.index(b"token_embd.weight") - 8
    path.write_bytes(data[:place] + pair(f"llama.{name}".encode(), kind, value) + data[place:])
    with pytest.raises(UnsupportedModel, match=r"config\.json|layers in a file"):
        architecture_of(find_model(str(path)))


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    data = write(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()
    return data[: data.rindex(b".weight") + 64]


def test_every_truncation_is_seen(tmp_path: Path, valid: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(valid)
    read_gguf(tmp_path / "m.gguf")
    end = valid.rindex(b".weight") + 7 + 4 + 16
    for length in range(0, end, 13):
        (tmp_path / "m.gguf").write_bytes(valid[:length])
        with pytest.raises(SourceError, match="ends inside its header"):
            read_gguf(tmp_path / "m.gguf")


def read_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        architecture: Any = architecture_of(find_model(str(path)))
    except SourceError:
        return
    assert architecture.tensors()


@given(changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_changed_bytes(
    tmp_path_factory: pytest.TempPathFactory, valid: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(valid)
    for place, value in changes:
        data[place % len(data)] = value
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.gguf", data)


@given(rest=st.binary(max_size=120), tensors=st.integers(0, 3), keys=st.integers(0, 3))
def test_any_bytes_behind_the_magic(
    tmp_path_factory: pytest.TempPathFactory, rest: bytes, tensors: int, keys: int
) -> None:
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.gguf", head(tensors, keys, rest=rest))


@given(values=st.lists(st.one_of(st.integers(0, 2**64 - 1), st.floats()), min_size=6, max_size=6))
def test_any_sizes(tmp_path_factory: pytest.TempPathFactory, values: list[int | float]) -> None:
    names = ["embedding_length", "feed_forward_length", "block_count", "attention.head_count"]
    names += ["attention.head_count_kv", "attention.key_length"]
    pairs = [pair(b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")]
    pairs += [
        pair(
            f"llama.{name}".encode(),
            *((12, struct.pack("<d", v)) if isinstance(v, float) else (10, struct.pack("<Q", v))),
        )
        for name, v in zip(names, values, strict=True)
    ]
    data = head(0, len(pairs), rest=b"".join(pairs))
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.gguf", data)

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_pipe.artifacts.layout import DTYPE_BYTES, DTYPE_CODE, TensorSpec
from qlora_pipe.artifacts.tensors import TensorReader, TensorWriter, dtype_code, torch_dtype_of
from qlora_pipe.errors import PlanError, SourceError, WeightError

SHAPES = [(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 3, 5)]


def random_tensor(spec: TensorSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(spec.nbytes)
    numbers = torch.randint(-100, 100, spec.shape, generator=generator)
    return numbers.to(torch_dtype_of(spec.dtype)) if spec.dtype != "BOOL" else numbers > 0


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    layout = {name: TensorSpec(dtype_code(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(folder, layout) as writer:
        for name in reversed(layout):
            writer.write(name, tensors[name])


@pytest.mark.parametrize("code", DTYPE_BYTES)
def test_round_trip_of_every_dtype_and_shape(code: str, tmp_path: Path) -> None:
    tensors = {f"t{number}": random_tensor(TensorSpec(code, shape)) for number, shape in enumerate(SHAPES)}
    write(tmp_path, tensors)
    theirs, ours = load_file(tmp_path / "model.safetensors"), TensorReader(tmp_path)
    assert set(ours) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        for found in (theirs[name], ours.read(name)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)


def test_dtypes_that_do_not_align(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.uint8), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.float64)}
    write(tmp_path, tensors)
    theirs = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


def test_codes_and_dtypes_are_inverse() -> None:
    assert {dtype_code(torch_dtype_of(code)) for code in DTYPE_BYTES} == set(DTYPE_BYTES) == set(DTYPE_CODE.values())
    assert all(torch_dtype_of(code).itemsize == size for code, size in DTYPE_BYTES.items())


def test_a_file_of_safetensors_itself(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "n": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    reader = TensorReader(tmp_path)
    assert "w" in reader
    assert "v" not in reader
    assert torch.equal(reader.read("w"), tensors["w"])


def test_the_tensor_read_is_in_memory_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"w": torch.zeros(4)})
    TensorReader(tmp_path).read("w").fill_(9)
    assert not TensorReader(tmp_path).read("w").any()


def test_views_and_gradients_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.t(), "s": base[:, 1], "p": torch.nn.Parameter(base)}
    write(tmp_path, tensors)
    theirs = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)


def test_shards_and_stem(tmp_path: Path) -> None:
    layout = {f"t{number}": TensorSpec("F32", (4,)) for number in range(5)}
    with TensorWriter(tmp_path, layout, stem="part", limit=32) as writer:
        for number, name in enumerate(layout):
            writer.write(name, torch.full((4,), float(number)))
    assert len(list(tmp_path.glob("part-*-of-00003.safetensors"))) == 3
    reader = TensorReader(tmp_path, "part")
    assert [reader.read(name)[0].item() for name in layout] == [0, 1, 2, 3, 4]


def test_a_planned_tensor_that_is_missing(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, {"a": TensorSpec("F32", (1,)), "b": TensorSpec("F32", (1,))})
    writer.write("b", torch.ones(1))
    with pytest.raises(PlanError, match="1 planned tensors were not written, first a"):
        writer.close()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("b", torch.ones(2)),
        ("a", torch.ones(2, dtype=torch.float64)),
        ("a", torch.ones(2, dtype=torch.bfloat16)),
        ("a", torch.ones(2, dtype=torch.complex64)),
        ("a", torch.ones(2, 1)),
        ("a", torch.ones(3)),
    ],
)
def test_what_is_not_planned_is_refused(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    with (
        pytest.raises(PlanError, match=rf"tensor {name}"),
        TensorWriter(tmp_path, {"a": TensorSpec("F32", (2,))}) as writer,
    ):
        writer.write(name, tensor)


def test_no_tensor_twice(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, {"a": TensorSpec("F32", (2,))})
    writer.write("a", torch.ones(2))
    with pytest.raises(PlanError, match="was written twice"):
        writer.write("a", torch.ones(2))
    writer.close()


def test_an_error_inside_is_not_hidden_by_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), TensorWriter(tmp_path, {"a": TensorSpec("F32", (2,))}):
        raise ZeroDivisionError


def test_an_unknown_name_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(1)})
    with pytest.raises(SourceError, match="expected a tensor nope"):
        TensorReader(tmp_path).read("nope")


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(100)})
    reader, path = TensorReader(tmp_path), tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SourceError, match="truncated inside tensor a"):
        reader.read("a")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_counted(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[1, 2] = tensor[2, 4] = bad
    write(tmp_path, {"fine": torch.ones(3, dtype=dtype), "bad": tensor})
    reader = TensorReader(tmp_path)
    assert reader.read_float("fine").dtype == torch.float32
    with pytest.raises(WeightError, match="tensor bad holds 2 NaN or Inf of 15 values"):
        reader.read_float("bad")


def test_floats_of_another_dtype(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0)})
    assert TensorReader(tmp_path).read_float("a", torch.float64).dtype == torch.float64
    assert TensorReader(tmp_path).read_float("none").numel() == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_integers_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, {"a": torch.ones(3, dtype=dtype)})
    with pytest.raises(WeightError, match=r"tensor a has dtype .*, expected floating point"):
        TensorReader(tmp_path).read_float("a")


@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable()),
        st.builds(TensorSpec, st.sampled_from(list(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=5,
    ),
    limit=st.integers(1, 200),
)
def test_any_layout_comes_back(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TensorSpec], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    with TensorWriter(folder, specs, limit=limit) as writer:
        for name, spec in specs.items():
            writer.write(name, random_tensor(spec))
    reader = TensorReader(folder)
    assert set(reader) == set(specs)
    assert all(torch.equal(reader.read(name), random_tensor(spec)) for name, spec in specs.items())

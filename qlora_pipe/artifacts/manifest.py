"""The manifest: what an artifact is, from what it was made, and the hash of every file.

It holds nothing that differs between two runs of the same configuration: no times, no host names.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_pipe.errors import ArtifactError

SCHEMA = "qlora_pipe.artifact"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 4 * 2**20


def canonical(value: Any) -> bytes:
    """The one JSON spelling of `value` that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, read in 4 MiB pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256", _bufsize=_CHUNK).hexdigest()


def identity(stage: str, code_version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 over the stage's code version, its settings and the identities of all it reads."""
    return digest({"stage": stage, "code_version": code_version, "settings": settings, "inputs": dict(inputs)})


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """`planned` are the bytes of weight files the plan foretold; they equal those in `files`."""

    stage: str
    identity: str
    code_version: int
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, FileEntry]
    planned: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(body, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder; raises ArtifactError if there is none that can be trusted."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{folder}: expected an artifact, found no {MANIFEST}; run the stage again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: expected a manifest, found {error}; delete the folder and run again") from error
    if not isinstance(body, dict) or body.pop("schema", None) != SCHEMA:
        raise ArtifactError(f"{path}: expected schema {SCHEMA}; this is not an artifact of qlora-pipe")
    version = body.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path}: expected schema version {SCHEMA_VERSION}, found {version}; upgrade qlora-pipe")
    try:
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        return Manifest(files=files, **body)
    except (TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: malformed manifest ({error}); delete the folder and run again") from error


def list_files(folder: Path) -> list[str]:
    """Relative POSIX paths of all files below `folder` but the manifest, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def check_files(folder: Path) -> Manifest:
    """Re-hash every file of an artifact and re-derive its identity; raises ArtifactError naming what differs."""
    manifest = read_manifest(folder)
    try:
        expected = identity(manifest.stage, manifest.code_version, manifest.settings, manifest.inputs)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / MANIFEST}: malformed manifest ({error}); run the stage again") from error
    if manifest.identity != expected:
        raise ArtifactError(f"{folder / MANIFEST}: the identity does not follow from its contents; run the stage again")
    found = list_files(folder)
    if found != sorted(manifest.files):
        odd = sorted(set(found) ^ set(manifest.files))
        raise ArtifactError(f"{folder}: files differ from the manifest, first {odd[0]}; run the stage again")
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            same = size == entry.bytes and file_digest(path) == entry.sha256
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be read: {error.strerror}; mend that and run again") from error
        if size != entry.bytes:
            raise ArtifactError(f"{path}: expected {entry.bytes} bytes, found {size}; run the stage again")
        if not same:
            raise ArtifactError(f"{path}: the content differs from its SHA-256 in the manifest; run the stage again")
    return manifest

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_pipe.artifacts.manifest import (
    FileEntry,
    Manifest,
    canonical,
    check_files,
    digest,
    file_digest,
    identity,
    list_files,
    read_manifest,
)
from qlora_pipe.errors import ArtifactError

SETTINGS: dict[str, Any] = {"rank": 4, "scales": [0.0, 1.0]}
INPUTS = {"source": "aa", "data:task": "bb"}


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    (tmp_path / "peft").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "peft/manifest.json").write_text("of another tool")
    files = {name: FileEntry(file_digest(tmp_path / name), (tmp_path / name).stat().st_size) for name in FILES}
    manifest = Manifest("train", identity("train", 1, SETTINGS, INPUTS), 1, SETTINGS, INPUTS, files, {}, {"torch": "2"})
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    return tmp_path


FILES = ["a.json", "peft/manifest.json"]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip(artifact: Path) -> None:
    manifest = check_files(artifact)
    assert manifest == read_manifest(artifact)
    assert manifest.to_json() == (artifact / "manifest.json").read_text()
    assert (manifest.stage, manifest.settings, manifest.inputs) == ("train", SETTINGS, INPUTS)
    assert list_files(artifact) == sorted(manifest.files) == FILES


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 2, "b": "1"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_identity_moves_with_each_of_its_parts() -> None:
    found = [
        identity("train", 1, SETTINGS, INPUTS),
        identity("prune", 1, SETTINGS, INPUTS),
        identity("train", 2, SETTINGS, INPUTS),
        identity("train", 1, SETTINGS | {"rank": 5}, INPUTS),
        identity("train", 1, SETTINGS, INPUTS | {"source": "ab"}),
        identity("train", 1, SETTINGS, {"source": "aa"}),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == identity("train", 1, dict(reversed(SETTINGS.items())), dict(reversed(INPUTS.items())))


def test_versions_and_plan_are_no_part_of_the_identity(artifact: Path) -> None:
    edit(artifact, versions={"torch": "3"})
    assert check_files(artifact).versions == {"torch": "3"}


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte(artifact: Path, name: str) -> None:
    text = (artifact / name).read_bytes()
    (artifact / name).write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=rf"{name}: the content differs from its SHA-256"):
        check_files(artifact)


def test_a_changed_size(artifact: Path) -> None:
    (artifact / "a.json").write_text("{}\n")
    with pytest.raises(ArtifactError, match=r"a.json: expected 2 bytes, found 3"):
        check_files(artifact)


def test_a_missing_and_an_extra_file(artifact: Path) -> None:
    (artifact / "b.json").write_text("")
    with pytest.raises(ArtifactError, match=r"differ from the manifest, first b.json"):
        check_files(artifact)
    (artifact / "b.json").unlink()
    (artifact / "a.json").unlink()
    with pytest.raises(ArtifactError, match=r"differ from the manifest, first a.json"):
        check_files(artifact)


@pytest.mark.parametrize("changes", [{"settings": {"rank": 5}}, {"inputs": {}}, {"stage": "prune"}, {"identity": "0"}])
def test_what_the_identity_says_must_be_true(artifact: Path, changes: dict[str, Any]) -> None:
    edit(artifact, **changes)
    with pytest.raises(ArtifactError, match="the identity does not follow from its contents"):
        check_files(artifact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other"}, "not an artifact of qlora-pipe"),
        ({"schema_version": 99}, "expected schema version 1, found 99; upgrade"),
        ({"files": []}, "malformed manifest"),
        ({"files": {"a": {"sha256": "0"}}}, "malformed manifest"),
        ({"files": {"a": 3}}, "malformed manifest"),
        ({"extra": 1}, "malformed manifest"),
        ({"inputs": "text"}, "malformed manifest"),
        ({"inputs": 3}, "malformed manifest"),
        ({"settings": {"rate": float("nan")}}, "malformed manifest"),
    ],
)
def test_malformed_manifests(artifact: Path, changes: dict[str, Any], message: str) -> None:
    edit(artifact, **changes)
    with pytest.raises(ArtifactError, match=message):
        check_files(artifact)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", pytest.param("[" * 200_000, id="deep"), '{"schema": "qlora_pipe.artifact"}']
)
def test_not_a_manifest(artifact: Path, text: str) -> None:
    (artifact / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest.json: expected"):
        read_manifest(artifact)


def test_bytes_that_are_no_text(artifact: Path) -> None:
    (artifact / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="expected a manifest"):
        read_manifest(artifact)


def test_no_artifact_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected an artifact, found no manifest.json"):
        read_manifest(tmp_path / "nothing")

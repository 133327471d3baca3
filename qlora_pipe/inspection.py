"""What is inside a run or an artifact, from manifests and tensor headers alone. Reads no weight, needs no torch."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qlora_pipe.artifacts.headers import read_folder
from qlora_pipe.artifacts.layout import TensorSpec
from qlora_pipe.artifacts.manifest import MANIFEST, Manifest, read_manifest
from qlora_pipe.errors import ArtifactError, ConfigError
from qlora_pipe.known import CHAIN
from qlora_pipe.report.facts import Kept, configuration_name, kept_counts, selection_rows
from qlora_pipe.report.table import render
from qlora_pipe.units import format_bytes
from quant.storage import Choice

_SHORT = 12
_BAR = 40
_WEIGHTS = re.compile(r"(?P<stem>[^/]+?)(-\d{5}-of-\d{5})?\.safetensors$")
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def describe(path: Path) -> str:
    """A run or an artifact in a page of text. Raises ArtifactError if `path` is neither, or damaged."""
    if (path / MANIFEST).is_file():
        return _describe_artifact(path)
    return _describe_run(path)


def stages_of(run: Path) -> list[str]:
    """The stages a run folder has an artifact (or a broken link) for; raises ArtifactError if it has none."""
    found = [name for name in CHAIN if (run / name).exists() or (run / name).is_symlink()]
    if not found:
        raise ArtifactError(
            f"{run}: expected a run folder or an artifact, found neither; give the folder that `run:` names in the "
            "configuration, or a stage inside it"
        )
    return found


def weight_sets(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(folder inside the artifact, stem) of every set of safetensors files, sharded or not."""
    matches = (_WEIGHTS.search(name) for name in sorted(manifest.files))
    yield from dict.fromkeys((match.string[: match.start()], match["stem"]) for match in matches if match)


def plural(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _describe_run(run: Path) -> str:
    manifests = {name: read_manifest(run / name) for name in stages_of(run)}
    rows = [
        (name, manifest.identity[:_SHORT], str(len(manifest.files)), format_bytes(_size(manifest)))
        for name, manifest in manifests.items()
    ]
    parts = [
        f"run {run}: {len(manifests)} of {len(CHAIN)} stages",
        render(("stage", "identity", "files", "size"), rows, text_columns=2),
    ]
    changed = _changed_settings(run / "config.yaml")
    if changed:
        parts += [
            "settings that differ from their defaults:",
            render(("setting", "value", "default"), changed, 3),
        ]
    return "\n\n".join(parts)


def _changed_settings(path: Path) -> list[tuple[str, str, str]]:
    """(setting, value, default) of what the user chose; the run's own name aside."""
    from qlora_pipe.config_file import load

    if not path.exists():
        return []
    try:
        config = load(path)
    except ConfigError as error:
        raise ArtifactError(f"{error}; the run is of another version, run the chain again") from error
    return [row for row in _differences(config, "") if row[0] != "run"]


def _differences(section: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _differences(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for key, entry in value.items():
                yield from _differences(entry, f"{prefix}{name}.{key}.")
        elif field.is_required():
            yield f"{prefix}{name}", _told(value), "-"
        elif value != field.get_default(call_default_factory=True):
            yield f"{prefix}{name}", _told(value), _told(field.get_default(call_default_factory=True))


def _told(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _describe_artifact(folder: Path) -> str:
    manifest = read_manifest(folder)
    rows = [("identity", manifest.identity), ("code version", str(manifest.code_version))]
    rows += [(f"from {name}", value) for name, value in manifest.inputs.items()]
    rows += [(f"setting {name}", json.dumps(value)) for name, value in manifest.settings.items()]
    rows += [(name, version) for name, version in manifest.versions.items()]
    files = [(name, format_bytes(entry.bytes), entry.sha256[:_SHORT]) for name, entry in manifest.files.items()]
    parts = [
        f"{manifest.stage}: {plural(len(manifest.files), 'file')}, {format_bytes(_size(manifest))}",
        render((manifest.stage, ""), rows, text_columns=2),
        render(("file", "size", "sha256"), files),
    ]
    for place, stem in weight_sets(manifest):
        specs = {name: where.spec for name, where in read_folder(folder / place, stem).items()}
        parts.append(render((f"tensor in {place}{stem}", "dtype", "shape", "count", "bytes"), fold(specs)))
    if manifest.stage == "select":
        selection = _read(folder / "selection.json")
        parts.append(render(("selection", ""), selection_rows(selection), text_columns=2))
        if "sparsity" not in selection:
            parts.append(_describe_kept(kept_counts(_read(folder / "kept.json"))))
    if manifest.stage == "allocate":
        parts.append(_describe_choices(_read(folder / "allocation.json")["choices"].values()))
    return "\n\n".join(parts)


def fold(specs: Mapping[str, TensorSpec]) -> list[tuple[str, str, str, str, str]]:
    """(name, dtype, shape, count, bytes): tensors that differ in nothing but their layer share a row."""
    groups: dict[str, Counter[TensorSpec]] = {}
    for name, spec in specs.items():
        groups.setdefault(_LAYER.sub("*", name, count=1), Counter())[spec] += 1
    return [
        (name, spec.dtype, " x ".join(map(str, spec.shape)), str(count), format_bytes(count * spec.nbytes))
        for name, kinds in groups.items()
        for spec, count in kinds.items()
    ]


def _describe_kept(kept: tuple[Kept, ...]) -> str:
    rows = [
        (str(layer), f"{row.kv_heads} of {row.all_kv_heads}", f"{row.ffn} of {row.all_ffn}")
        for layer, row in enumerate(kept)
    ]
    return render(("layer", "KV groups kept", "FFN channels kept"), rows, text_columns=0)


def _describe_choices(choices: Iterable[dict[str, Any]]) -> str:
    rows = list(choices)
    bits = Counter(row["bits"] for row in rows)
    lines = [
        (f"{width} bits", "#" * max(1, round(_BAR * count / len(rows))), str(count))
        for width, count in sorted(bits.items())
    ]
    finer = Counter(map(Choice.from_json, rows))
    ordered = sorted(finer, key=lambda choice: (choice.bits, choice.block_size, choice.rank, choice.name))
    named = [(configuration_name(choice), str(finer[choice])) for choice in ordered]
    shares = render(("code width", "", "matrices"), lines, text_columns=2)
    return f"{shares}\n\n{render(('configuration', 'matrices'), named)}"


def _size(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files.values())


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: expected JSON, found {error}; run the stage again") from error

"""From a YAML file and `--set` overrides to a Config, or to one paragraph that says what to change."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_pipe.config import Config
from qlora_pipe.config_data import Dataset
from qlora_pipe.config_problems import explain
from qlora_pipe.config_yaml import Path as Keys
from qlora_pipe.config_yaml import dump_yaml, parse_yaml
from qlora_pipe.errors import ConfigError

MAX_BYTES = 2**20


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file `path`, with overrides such as `train.rank=8` put over it.

    `run` becomes runs/<name of the file> if the file does not name one. A data file is taken from the folder
    of the configuration if it is there, else from the current directory. Raises ConfigError.
    """
    path = Path(path)
    data, lines = _read(path)
    places: dict[Keys, str] = {keys: f"{path}:{line}" for keys, line in lines.items()}
    for override in overrides:
        _apply(override, data, places)
    try:
        # Strict: `rank: true` and `rank: "8"` are mistakes, not numbers.
        config = Config.model_validate(data, strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, places, str(path))) from error
    return _resolve(config, path)


def resolved_yaml(config: Config) -> str:
    """The configuration with every default written out; `load` reads it back."""
    return dump_yaml(config.model_dump(mode="json"))


def _read(path: Path) -> tuple[dict[str, Any], dict[Keys, int]]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: expected a configuration file, found nothing there; check the path, or write a "
            "starter file with `qlora-pipe init`"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}; give a readable YAML file") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_BYTES} bytes, found more: not a configuration")
    try:
        data, lines = parse_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"{path}:{line}: expected UTF-8 text, found byte 0x{raw[error.start]:02x}"
        raise ConfigError(found) from error
    except ConfigError as error:
        raise ConfigError(f"{path}:{error}") from error
    if data is None:
        raise ConfigError(f"{path}: the file is empty; `qlora-pipe init` writes a starter file")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected settings such as `model: NAME`, found {type(data).__name__}")
    return data, lines


def _apply(override: str, data: dict[str, Any], places: dict[Keys, str]) -> None:
    """Put one `a.b=value` into `data`, and name it as the place of what it sets."""
    where = f"--set {override}"
    dotted, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in dotted.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"{where}: expected KEY=VALUE, for example train.learning_rate=1e-4")
    node = data
    for depth, key in enumerate(keys[:-1], start=1):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            place = places.get(keys[:depth], "an earlier --set")
            raise ConfigError(
                f"{where}: {'.'.join(keys[:depth])} is one value ({place}), not a mapping, so nothing "
                "inside it can be set; write it as a mapping, or set it as a whole"
            )
    node[keys[-1]] = _override_value(text, where)
    for inner in [place for place in places if place[: len(keys)] == keys]:
        del places[inner]
    places[keys] = where


def _override_value(text: str, where: str) -> Any:
    """A scalar or list; what YAML would take for a mapping or cannot read is text, as `Title: {title}`."""
    try:
        value, _ = parse_yaml(text)
    except ConfigError as error:
        if re.match(r"\s*[\['\"]", text):
            reason = re.sub(r"^\d+: ", "", str(error))
            raise ConfigError(f"{where}: expected a value or a list such as [2, 4]: {reason}") from error
        return text
    return text if isinstance(value, dict) else value


def _resolve(config: Config, path: Path) -> Config:
    data = config.data
    resolved = data.model_copy(
        update={
            "calibration": _locate(data.calibration, path.parent),
            "task": _locate(data.task, path.parent),
            "evaluation": {name: _locate(entry, path.parent) for name, entry in data.evaluation.items()},
        }
    )
    return config.model_copy(update={"run": config.run or f"runs/{path.stem}", "data": resolved})


def _locate(dataset: Dataset, folder: Path) -> Dataset:
    if dataset.source.startswith("package:"):
        return dataset
    beside = folder / dataset.source
    return dataset.model_copy(update={"source": str(beside)}) if beside.exists() else dataset

"""A first configuration with every setting explained, and the JSON Schema of all of them.

Both are made from the fields of Config, so they cannot fall behind it.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_pipe.config import Config
from qlora_pipe.config_data import Data, Dataset
from qlora_pipe.config_yaml import dump_value
from qlora_pipe.units import parse_budget

_HEAD = """\
# Compiles a language model under a memory budget: qlora-pipe plan THIS_FILE, then qlora-pipe run THIS_FILE.
# Settings left out keep the values given here. First put your own texts under `data`.
"""
_COLUMN = 34
_DATA = Data(
    calibration=Dataset(source="calibration.txt"),
    task=Dataset(source="task.jsonl", prompt="{question}", response="{answer}"),
)


def starter(model: str, budget: str) -> str:
    """A commented YAML file that load() accepts, for a model and a budget as Config has them.

    The texts are placeholders. Raises ConfigError for a budget that cannot be read.
    """
    parse_budget(budget)
    config = Config.model_validate({"model": model, "data": _DATA, "decompose": {"budget": budget}})
    return _HEAD + "\n".join(_lines(config, 0)) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors."""
    schema = Config.model_json_schema()
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **schema, "title": "qlora-pipe configuration"}


def _lines(section: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Dataset) and value == Dataset(source=value.source):
            value = value.source
        if isinstance(value, BaseModel):
            about = field.description or (type(value).__doc__ or "").partition("\n")[0]
            if depth == 0:
                yield from ("", f"# {about}", f"{name}:")
            else:
                yield _commented(f"{indent}{name}:", about)
            yield from _lines(value, depth + 1)
        else:
            plain = list(value) if isinstance(value, tuple) else value
            yield _commented(f"{indent}{name}: {dump_value(_listed(plain))}", _about(field))


def _commented(setting: str, about: str) -> str:
    return f"{setting:<{_COLUMN}}  # {about}" if about else setting


def _about(field: FieldInfo) -> str:
    choices = " | ".join(map(str, _choices(field.annotation)))
    return f"{field.description or ''} ({choices})" if choices else field.description or ""


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, also of a list of them."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    inner = get_args(annotation)
    return _choices(inner[0]) if get_origin(annotation) is tuple and inner else ()


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, list | tuple) else value

"""What is wrong with a configuration, in words: where, which key, what was expected and what to write."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlora_pipe.config import Config
from qlora_pipe.config_yaml import Path as Keys

_KINDS = {
    "model_type": "a mapping of settings",
    "dict_type": "a mapping of names",
    "tuple_type": "a list",
    "string_type": "text (quote it if it is meant)",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "finite_number": "a finite number",
}
_SHOWN = 60


def explain(error: ValidationError, places: Mapping[Keys, str], file: str) -> str:
    """One paragraph for all problems of `error`.

    `places` names the origin (file:line, or the override) of every path of keys that a user wrote.
    """
    found = [f"{_place(problem['loc'], places, file)}: {_describe(problem)}" for problem in error.errors()]
    return "; ".join(found)


def _place(loc: Keys, places: Mapping[Keys, str], file: str) -> str:
    """Where the innermost part of `loc` that was written stands."""
    for length in range(len(loc), 0, -1):
        if loc[:length] in places:
            return places[loc[:length]]
    return file


def _describe(problem: ErrorDetails) -> str:
    loc, kind, value = problem["loc"], problem["type"], problem["input"]
    name = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        return f"unknown key {name}; {_suggest(loc)}"
    if kind == "missing":
        field = _model_at(loc[:-1]).model_fields[str(loc[-1])]
        return f"{name} is required ({field.description or 'settings'}), but is not given"
    if kind == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{name}: {text}" if name else text
    expected = _KINDS.get(kind) or problem["msg"].removeprefix("Input should be ")
    if expected.startswith(("greater", "less")):
        expected = f"a value {expected}"
    return f"{name}: expected {expected}, found {_show(value)}"


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _suggest(loc: Keys) -> str:
    """The valid name that an unknown one was probably meant to be."""
    section, key = loc[:-1], str(loc[-1])
    names = list(_model_at(section).model_fields)
    nearest = difflib.get_close_matches(key.lower(), names, n=1)
    nearest += [name for name in names if _initials(name) == key.lower()]
    if nearest:
        return f"did you mean {'.'.join(map(str, (*section, nearest[0])))}?"
    elsewhere = [dotted for dotted in _dotted(Config) if dotted.rpartition(".")[2] == key]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"expected one of {', '.join(names)}"


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_"))


def _dotted(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner = _plain(field.annotation)
        found.append(prefix + name)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _dotted(inner, f"{prefix}{name}.")
    return found


def _model_at(section: Keys) -> type[BaseModel]:
    """The model that holds the keys of `section`; mappings by name and lists are stepped through."""
    annotation: Any = Config
    for key in section:
        annotation = _plain(annotation)
        if get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        else:
            annotation = annotation.model_fields[str(key)].annotation
    return _plain(annotation)


def _plain(annotation: Any) -> Any:
    """`annotation` without Annotated."""
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation

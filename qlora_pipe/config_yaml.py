"""YAML as the configuration uses it: plain data and the line of every key.

The scalars are those of YAML 1.2's core schema, so `1e-4` is a number and `no` is a word. Anchors, aliases,
tags and duplicate keys are refused: a configuration says everything once, where a reader looks for it.
"""

import re
from typing import Any

import yaml

from qlora_pipe.errors import ConfigError

Path = tuple[str | int, ...]

MAX_DEPTH = 20
_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # 18 digits: a longer number is beyond any setting, and the field's own check says so.
    "int": (r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    "float": (r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the core schema's scalars, a limit of depth and no aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the attribute that add_implicit_resolver fills
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases (& and *) are not supported: write the value out, or quote it",
                problem_mark=event.start_mark,
            )
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"expected at most {MAX_DEPTH} levels, found more", problem_mark=event.start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than a word; never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    """Only double quotes bring every kind of line end back as it was."""
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", value, style=style)


_Dumper.add_representer(str, _text)
for _kind, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})\Z"), _first)


def parse_yaml(text: str) -> tuple[Any, dict[Path, int]]:
    """The data in `text`, lists as tuples, and the line (from 1) of every key and list entry by its path.

    Raises ConfigError with the line and the reason, without a file name.
    """
    lines: dict[Path, int] = {}
    try:
        node = _Loader(text).get_single_node()
        return (None if node is None else _data(node, (), lines)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"{line}: not valid YAML: character U+{error.character:04X} is not allowed"
        raise ConfigError(found) from error


def dump_yaml(data: Any) -> str:
    """`data` in block style, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_value(value: Any) -> str:
    """A scalar, list or mapping on one line, as it stands behind a key."""
    flow = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=2**31)
    return flow.strip()[1:-1]


def _data(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return tuple(_data(entry, (*path, index), lines) for index, entry in enumerate(node.value))
    match node.tag.removeprefix(_TAG):
        case "str":
            return node.value
        case "null":
            return None
        case "bool":
            return node.value.lower() == "true"
        case "int":
            return int(node.value)
        case "float":
            return float(node.value)
    raise yaml.MarkedYAMLError(problem=f"tags are not supported, found {node.tag}", problem_mark=node.start_mark)


def _mapping(node: yaml.MappingNode, path: Path, lines: dict[Path, int]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in node.value:
        if key.tag != _TAG + "str":
            problem = f"expected a name as key, found {getattr(key, 'value', '')!r}: quote it if it is one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        if key.value in data:
            problem = f"{'.'.join(map(str, (*path, key.value)))} is given twice, first on line "
            problem += f"{lines[(*path, key.value)]}: keep one"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        lines[(*path, key.value)] = key.start_mark.line + 1
        data[key.value] = _data(value, (*path, key.value), lines)
    return data

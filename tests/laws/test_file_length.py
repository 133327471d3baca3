"""Files under 350 lines, functions that fit a screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("solver", "quant", "prune", "qlora_pipe", "benchmarks", "examples")
MAX_FILE = 350
MAX_FUNCTION = 60


def too_long(source: str) -> list[str]:
    """What in `source` is too long. A function's docstring and decorators do not count."""
    lines = len(source.splitlines())
    found = [f"file: {lines} lines"] if lines > MAX_FILE else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            end = node.end_lineno or node.lineno
            length = end - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{node.name}: {length} lines")
    return found


def test_files_and_functions_are_short() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(file.relative_to(ROOT)): too_long(file.read_text()) for file in files}
    assert files
    assert {name: problems for name, problems in found.items() if problems} == {}


@pytest.mark.parametrize(
    ("source", "problems"),
    [
        ("x = 1\n" * MAX_FILE, []),
        ("x = 1\n" * (MAX_FILE + 1), ["file: 351 lines"]),
        ("def f():\n" + "    x = 1\n" * (MAX_FUNCTION - 1), []),
        ("def f():\n" + "    x = 1\n" * MAX_FUNCTION, ["f: 61 lines"]),
        ("class A:\n    def f(self):\n" + "        x = 1\n" * MAX_FUNCTION, ["f: 61 lines"]),
        ('def f():\n    """One\n\n    two."""\n' + "    x = 1\n" * (MAX_FUNCTION - 1), []),
    ],
)
def test_the_law_sees_what_is_too_long(source: str, problems: list[str]) -> None:
    assert too_long(source) == problems

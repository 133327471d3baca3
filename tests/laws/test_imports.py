"""Who may import whom, and what must not be imported before it is needed."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("solver", "quant", "prune", "qlora_pipe")
# What a package may import besides itself and the standard library; None: everything but HF.
ALLOWED: dict[str, set[str] | None] = {
    "solver": {"numpy", "scipy", "pulp"},
    "quant": {"torch"},
    "prune": {"torch"},
    "qlora_pipe": None,
}
# The one file of kernels, which is imported where Triton is there.
ALSO = {"quant/triton_l4q.py": {"triton"}}
HF = {"transformers", "peft", "accelerate", "bitsandbytes"}
HEAVY = {*HF, "torch", "matplotlib", "scipy"}
LIGHT = ["errors", "units", "config", "config_file", "config_problems", "config_yaml", "config_rules", "starter"]


def imported(source: str) -> Iterator[str]:
    """Top-level modules that `source` imports, in functions too; '.' for a relative import."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (name.name.partition(".")[0] for name in names)
            case ast.ImportFrom(module=module, level=level):
                yield "." if level else str(module).partition(".")[0]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name.partition(".")[0]


def forbidden(path: Path, source: str) -> list[str]:
    """Imports of the module at `path` (relative to the repository) that the law forbids."""
    package = path.parts[0]
    allowed = ALLOWED[package]
    found = set(imported(source)) - {package}
    if allowed is not None:
        return sorted(found - allowed - ALSO.get(path.as_posix(), set()) - sys.stdlib_module_names)
    door = path.parts[:2] == ("qlora_pipe", "hf")
    return sorted(found & ({"."} if door else {".", *HF}))


@pytest.mark.parametrize("package", OURS)
def test_packages_import_only_what_they_may(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    found = {str(file.relative_to(ROOT)): forbidden(file.relative_to(ROOT), file.read_text()) for file in files}
    assert files
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("path", "source", "names"),
    [
        ("solver/a.py", "import torch", ["torch"]),
        ("solver/a.py", "from quant.grid import x", ["quant"]),
        ("solver/a.py", "import numpy, json\nfrom solver import b", []),
        ("quant/a.py", "def f():\n    import prune.slice", ["prune"]),
        ("quant/a.py", "import torch.nn.functional as F", []),
        ("prune/sub/a.py", "from solver import allocate\nfrom quant import pack", ["quant", "solver"]),
        ("prune/a.py", "from . import b", ["."]),
        ("qlora_pipe/a.py", "from transformers import Trainer", ["transformers"]),
        ("qlora_pipe/a.py", "importlib.import_module('peft.tuners')", ["peft"]),
        ("qlora_pipe/stages/a.py", "if True:\n    import bitsandbytes", ["bitsandbytes"]),
        ("qlora_pipe/hf/a.py", "from transformers import Trainer", []),
        ("qlora_pipe/a.py", "import quant, prune, solver, torch", []),
    ],
)
def test_the_law_sees_what_it_forbids(path: str, source: str, names: list[str]) -> None:
    assert forbidden(Path(path), source) == names


def heavy_after(statements: str) -> set[str]:
    """Heavy modules that a fresh interpreter holds after `statements`."""
    script = f"{statements}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stderr.splitlines()[-1]))


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    assert heavy_after("".join(f"import qlora_pipe.{name}\n" for name in LIGHT)) == set()


def test_heavy_imports_are_seen() -> None:
    assert heavy_after("import scipy") == {"scipy"}


def test_the_frontier_needs_no_torch() -> None:
    assert not heavy_after("import qlora_pipe.frontier") & {*HF, "torch", "matplotlib"}


def test_planning_imports_nothing_heavy() -> None:
    assert heavy_after("import qlora_pipe.plan") == set()


def test_help_imports_nothing_heavy() -> None:
    assert heavy_after("import qlora_pipe.cli") == set()
    shown = "from qlora_pipe.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert heavy_after(shown) == set()

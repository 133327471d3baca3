"""`import qlora_pipe` is enough, before or after transformers, and costs nothing without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from qlora_pipe.hf import registration

ROOT = Path(__file__).parents[4]
LAST = """
import transformers.quantizers.auto as table
assert "qlora_pipe" not in table.AUTO_QUANTIZER_MAPPING
import qlora_pipe
assert "qlora_pipe" in table.AUTO_QUANTIZER_MAPPING and "qlora_pipe" in table.AUTO_QUANTIZATION_CONFIG_MAPPING
"""


def test_transformers_before_us() -> None:
    # The other order is that of tests/consumers/test_packed_folder.py.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LAST], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_registering_again_changes_nothing() -> None:
    before, finders = AUTO_QUANTIZER_MAPPING["qlora_pipe"], list(sys.meta_path)
    registration.register()
    assert AUTO_QUANTIZER_MAPPING["qlora_pipe"] is before
    assert sys.meta_path == finders


def test_one_finder_waits_for_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if type(finder).__module__ != registration.__name__]
    monkeypatch.setattr(sys, "meta_path", list(others))
    monkeypatch.delitem(sys.modules, registration.TABLE)
    registration.register()
    registration.register()
    assert sys.meta_path[1:] == others
    finder = sys.meta_path[0]
    path = sys.modules["transformers.quantizers"].__path__
    assert finder.find_spec("transformers.quantizers.base", path) is None
    spec = finder.find_spec(registration.TABLE, path)
    assert spec is not None
    assert spec.origin is not None
    assert spec.origin.endswith("auto.py")

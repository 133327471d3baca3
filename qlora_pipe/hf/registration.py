"""Making the quantizer known to transformers when, and only when, transformers is in use.

`import qlora_pipe` is all a user writes, before or after `import transformers`, and the command line must start
without either. So nothing is imported here: if transformers' table of quantizers exists, ours is added; if not, it is
added as the last act of importing that table. A process that never loads it pays for one entry in sys.meta_path.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

TABLE = "transformers.quantizers.auto"
"""The module that maps a `quant_method` to its quantizer."""

_QUANTIZER = "qlora_pipe.hf.quantizer"


class _Loader(SourceFileLoader):
    """Runs the module as ever, then ours, which registers itself in it."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        importlib.import_module(_QUANTIZER)


class _Finder(MetaPathFinder):
    """Speaks up for one module, wherever it lies, and leaves all others alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        found = PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None or not isinstance(found.loader, SourceFileLoader):
            return None
        return spec_from_file_location(fullname, found.origin, loader=_Loader(fullname, found.origin))


def register() -> None:
    """Register the quantizer now if transformers' table is loaded, else as soon as it is. Idempotent."""
    if TABLE in sys.modules:
        importlib.import_module(_QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

"""A folder of the user's own that is there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from qlora_pipe.artifacts.store import fsync, fsync_tree
from qlora_pipe.errors import ConfigError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder that is renamed to `output` when the block ends, and removed if it fails.

    It lies in a folder beside `output` that no other process has; what a killed one leaves is called
    .NAME.*.partial, is in nobody's way and stays. Raises ConfigError if `output` is there already, before the block or
    after it, or its place cannot be written.
    """
    _check_free(output)
    parent = output.absolute().parent
    try:
        place = Path(mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise ConfigError(f"{output}: expected a path that can be written, found {error.strerror}") from error
    try:
        # One in it, as `place` itself is for its owner alone.
        partial = place / "whole"
        partial.mkdir()
        yield partial
        fsync_tree(partial)
        _check_free(output)
        partial.rename(output)
        fsync(parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _check_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output} exists already; remove it or choose another name")

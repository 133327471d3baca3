"""A folder of the user's own that is there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_pipe.artifacts.store import fsync, fsync_tree
from qlora_pipe.errors import ConfigError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside `output` that is renamed to it when the block ends, and removed if it fails.

    Raises ConfigError if `output` is there already, or its place cannot be written.
    """
    if output.exists() or output.is_symlink():
        raise ConfigError(f"{output} exists already; remove it or choose another name")
    partial = output.absolute().parent / f".{output.name}.partial"
    # What a killed process left.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
    except OSError as error:
        raise ConfigError(f"{output}: expected a path that can be written, found {error.strerror}") from error
    try:
        yield partial
        fsync_tree(partial)
        partial.rename(output)
        fsync(partial.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

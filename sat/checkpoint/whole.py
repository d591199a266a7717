"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sat.checkpoint.format import CheckpointError


@contextmanager
def whole_folder(folder: Path, nbytes: int = 0) -> Iterator[Path]:
    """A folder beside ``folder`` to write in, which takes its name at the end; a failure leaves nothing.

    ``folder`` must not exist, or be empty; ``nbytes`` must be free on its disk.
    """
    refuse_occupied(folder)
    folder = folder.absolute()
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if nbytes > free:
            raise CheckpointError(f"{folder}: needs {nbytes / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rmdir()  # empty: checked above
        partial.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_occupied(folder: Path) -> None:
    """An error if ``folder`` is a file or holds anything."""
    if folder.is_dir() and next(folder.iterdir(), None) is None:
        return
    if folder.exists() or folder.is_symlink():
        raise CheckpointError(
            f"{folder}: exists and is not an empty folder; give a new destination or empty it first"
        )


def _sync(folder: Path) -> None:
    """Make the new name durable, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

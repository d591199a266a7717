"""Files that appear whole or not at all. Standard library only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

TEMPORARY = ".partial"
"""Ending of a file that is still being written."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, which appears whole or not at all."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a hidden file beside ``path``, then move it there in one step.

    A run that is killed at any moment leaves no half file under ``path``, and a reader never sees one. The
    disk is not waited for: after a power cut, only reading a file back tells.
    """
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}{TEMPORARY}")  # its own on every machine
    try:
        with draft.open("wb") as file:
            write(file)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise

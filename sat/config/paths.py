"""Where a relative path in a config leads."""

from __future__ import annotations

from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
"""The folder that holds the ``sat`` package, and in a checkout ``configs/`` and ``checkpoints/``."""

_SIGNS = ("pyproject.toml", ".git")


def find(path: str | Path, folder: Path | None = None) -> Path | None:
    """The existing file or folder that ``path`` names, absolute; None when there is none.

    A relative path is looked up from the current folder, then from the project that ``folder`` (the YAML
    file's) belongs to, then from this one.
    """
    path = Path(path).expanduser()
    roots = [Path.cwd(), *([project(folder)] if folder else []), HOME]
    return next((root / path for root in roots if _exists(root / path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system
        return False


def project(folder: Path) -> Path:
    """The nearest folder at or above ``folder`` that looks like the top of a project, else ``folder``."""
    return next((p for p in (folder, *folder.parents) if any((p / s).exists() for s in _SIGNS)), folder)

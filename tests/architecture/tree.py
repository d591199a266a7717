"""Files of the checkout for the architecture tests, as a clone would have them."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def files() -> tuple[Path, ...]:
    """Files of the project: tracked and new ones, without what git ignores; without git, all but caches."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0 and listing.stdout:
        found = (ROOT / name for name in listing.stdout.split("\0") if name)
    else:
        found = (path for path in ROOT.rglob("*") if not {".git", "__pycache__"} & set(path.parts))
    return tuple(sorted(path for path in found if path.is_file()))


def sources(folder: str = "sat") -> list[Path]:
    """Python files under a folder of the checkout, but for code that goes into folders for diffusers."""
    left = ROOT / "sat" / "control" / "hub"
    found = (path for path in files() if path.suffix == ".py" and path.is_relative_to(ROOT / folder))
    return [path for path in found if not path.is_relative_to(left)]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(path.read_text(), filename=str(path))


def place(path: Path, node: ast.AST) -> str:
    """``sat/engine.py:12``."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"

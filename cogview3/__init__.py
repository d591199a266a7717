"""CogView3 and CogView3-Plus: the package's public names, ``from cogview3 import Pipeline``.

The code is the package ``sat``, whose name SwissArmyTransformer has too: pip unpacks both into one folder. So
these names look first, without importing it, for the mark that our ``sat/__init__.py`` holds, and says in one
line what to do where another file stands in its place.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sat import CascadeOutput, CascadePipeline, Output, Pipeline

MARK = '__project__ = "cogview3"'
"""A line of our ``sat/__init__.py``, and of no other package's."""
AGAIN = (
    "Do: pip uninstall -y SwissArmyTransformer cogview3, then install cogview3 again (docs/install.md); "
    "keep SwissArmyTransformer in an environment of its own"
)

__all__ = ["CascadeOutput", "CascadePipeline", "Output", "Pipeline", "__version__"]


def overwritten() -> str | None:
    """The reason why the ``sat`` that Python finds is not ours, in one line; None where it is."""
    spec = find_spec("sat")
    if spec is None:
        return f"cogview3 needs its package `sat`, and there is none. {AGAIN}"
    place = Path(spec.origin) if spec.origin else Path(next(iter(spec.submodule_search_locations or [""])))
    if place.is_file() and MARK in place.read_text("utf-8", errors="replace"):
        return None
    ours = Path(__file__).resolve().parents[1] / "sat"
    if place.parent.resolve() == ours or place.resolve() == ours:
        return f"another package has overwritten or removed {ours / '__init__.py'} of cogview3. {AGAIN}"
    return (
        f"Python finds another package called `sat` first: {place.parent} instead of {ours}. Do: take "
        f"{place.parent.parent} off PYTHONPATH, or use an environment without it (docs/install.md)"
    )


def __getattr__(name: str) -> object:
    """The names of ``sat``, imported when they are first used (PEP 562); ImportError if it is not ours."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (reason := overwritten()) is not None:
        raise ImportError(reason)
    return getattr(import_module("sat"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

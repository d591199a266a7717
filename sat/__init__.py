"""CogView3 and CogView3-Plus: train and sample text-to-image diffusion models.

Importing this package imports nothing heavy; :class:`Pipeline` loads torch when it is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sat import compat

if TYPE_CHECKING:
    from sat.pipeline import CascadeOutput, CascadePipeline, Output, Pipeline

__version__ = "0.1.0"
__project__ = "cogview3"  # the mark by which `import cogview3` knows this package from another `sat`
__all__ = ["CascadeOutput", "CascadePipeline", "Output", "Pipeline", "__version__"]

_LAZY = dict.fromkeys(("CascadeOutput", "CascadePipeline", "Output", "Pipeline"), "sat.pipeline")

compat.install()


def __getattr__(name: str) -> object:
    """Import the public classes when they are first used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

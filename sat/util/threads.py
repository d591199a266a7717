"""How the CPU libraries under torch use threads. Standard library only: it runs before torch is imported."""

from __future__ import annotations

import os
import sys

SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "MKL_CBWR": "AUTO,STRICT"}
"""What :func:`prepare` sets in the environment."""


def prepare() -> None:
    """Set up the threads of a CPU run; what the user has set stays. Without effect once torch is imported.

    Waiting OpenMP threads sleep instead of spinning: a spinning thread holds the core that the one it waits
    for may need, and where other programs use the cores too a small network ran several times slower. MKL is
    asked for matrix products that do not depend on the number of threads (measured: no slower), so that one
    process and several ranks with fewer threads each draw the same float32 pictures to the last bit.
    """
    if "torch" in sys.modules:
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

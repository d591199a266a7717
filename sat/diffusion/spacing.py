"""Which of the training timesteps a run of a few steps visits."""

from __future__ import annotations

from typing import Literal

import numpy as np

Spacing = Literal["trailing", "leading", "karras"]
"""``trailing`` and ``leading`` pick training timesteps; ``karras`` noise levels between them."""


def timesteps(steps: int, total: int, spacing: Spacing = "trailing") -> list[int]:
    """``steps`` timesteps of 0 … total - 1, descending.

    ``trailing`` always starts at total - 1: 50 of 1000 are 999, 979, …, 19. ``leading`` always ends at 0:
    980, …, 0. Source: arXiv:2305.08891, table 2; official ``discretizer.py:14``.
    """
    if spacing == "karras":
        raise ValueError("karras spacing gives noise levels, not timesteps: see `karras`")
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total} (the training levels), got {steps}")
    if spacing == "trailing":
        return [int(t) for t in np.linspace(total - 1, 0, steps, endpoint=False).astype(int)]
    return [int(t) for t in (np.arange(steps) * (total // steps))[::-1]]


def karras(steps: int, smallest: float, largest: float, rho: float = 7.0) -> list[float]:
    """``steps`` noise levels from ``largest`` to ``smallest``, evenly spaced in noise^(1 / rho).

    Source: arXiv:2206.00364, eq. 5; official ``discretizer.py`` (``EDMDiscretization``).
    """
    if steps < 1 or not 0 < smallest <= largest or rho <= 0:
        raise ValueError(
            f"expected at least one step, 0 < smallest <= largest and rho > 0; "
            f"got steps {steps}, smallest {smallest}, largest {largest}, rho {rho}"
        )
    first, last = largest ** (1 / rho), smallest ** (1 / rho)
    return [float(s) for s in (first + np.linspace(0, 1, steps) * (last - first)) ** rho]

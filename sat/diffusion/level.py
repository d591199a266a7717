"""One noise level of a schedule."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Scalar = float | Tensor
"""A float while sampling (one level for the batch), a (B, 1, 1, 1) float32 tensor while training."""


class Level(NamedTuple):
    """x_t = alpha x0 + sigma eps, and what the network is told about it.

    ``index`` is the timestep the network sees, 0 … 999. ``net_alpha`` and ``net_sigma`` turn the network's
    output into x0: officially they are those of the nearest of the 1000 training levels, which differ a
    little from ``alpha`` and ``sigma`` wherever the schedule of a short run does (reference: traps 8).
    ``ratio`` is the relay blend: 0 without relay, 1 at the low-resolution image.
    """

    alpha: Scalar
    sigma: Scalar
    index: Scalar  # type: ignore[assignment] # hides tuple.index, which nothing here needs
    net_alpha: Scalar
    net_sigma: Scalar
    ratio: Scalar = 0.0


CLEAN = Level(1.0, 0.0, 0.0, 1.0, 0.0)
"""Where sampling ends: no noise."""

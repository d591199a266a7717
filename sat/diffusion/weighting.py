"""How much each noise level counts in the loss, as weights on the squared error of the network's output."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sat.diffusion.level import Level


class Weighting(Protocol):
    """(B, 1, 1, 1) weights, or 1."""

    def __call__(self, level: Level) -> Tensor | float: ...


class Uniform:
    """Every level alike in the network's own output: the official loss, both for v and for eps.

    The official code states it as a weight on the x0 error, 1 / sigma^2: the same thing.
    """

    def __call__(self, level: Level) -> Tensor | float:
        return 1.0

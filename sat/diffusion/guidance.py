"""Guidance: which conditions the network sees, and how its predictions are combined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sat.conditioning.condition import Condition
from sat.diffusion.level import Level

Denoise = Callable[[Tensor, Level], Tensor]
"""(rows, C, h, w) -> predicted x0 of the same shape, for the rows that :meth:`Guider.rows` asked for."""


class Guider(Protocol):
    """``rows`` once per image, ``__call__`` every step."""

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        """The conditions the network will see, in the order ``__call__`` feeds them."""
        ...

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        """Guided x0 of (B, C, h, w)."""
        ...


class ClassifierFree:
    """uncond + scale (cond - uncond); the unconditional half comes first. Scale 1 skips it altogether.

    Source: arXiv:2207.12598 in the convention scale = 1 + w; official ``guiders.py:51``.
    """

    def __init__(self, scale: float = 5.0) -> None:
        self.scale = scale

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        return cond if self.scale == 1 else Condition.cat([uncond, cond])

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        if self.scale == 1:
            return denoise(x, level)
        uncond, cond = denoise(torch.cat([x, x]), level).chunk(2)
        return torch.lerp(uncond, cond, self.scale)


class Unguided:
    """The conditional prediction as it is."""

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        return cond

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        return denoise(x, level)

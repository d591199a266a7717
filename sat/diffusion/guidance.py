"""Guidance: the conditions that the network sees, and the combination of its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.schedule import Level

Denoise = Callable[[Tensor, Level], Tensor]
"""(rows, C, h, w) -> predicted x0 of the same shape, for the rows that :meth:`Guider.rows` asked for."""


class Guider(Protocol):
    """``rows`` once per image, ``__call__`` every step."""

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        """The conditions the network will see, in the order ``__call__`` feeds them."""
        ...

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        """Guided x0 (B, C, h, w). ``denoise`` takes x for all rows, or B images for the last B of them."""
        ...


class ClassifierFree:
    """uncond + ``scale`` (cond - uncond); at ``scale`` 1 the unconditional half is not computed.

    ``rescale`` (0 to 1) brings the deviation of the result back towards that of the conditional prediction,
    against burnt pictures: arXiv:2305.08891, section 3.4.
    Source: arXiv:2207.12598 in the convention scale = 1 + w; official ``guiders.py:51``.
    """

    def __init__(self, scale: float = 5.0, rescale: float = 0.0) -> None:
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance rescale is {rescale:g}, expected 0 to 1")
        if not math.isfinite(scale):
            raise ValueError(f"guidance scale is {scale}, expected a finite number")
        self.scale, self.rescale = scale, rescale

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        return cond if self.scale == 1 else Condition.cat([uncond, cond])  # (2 B rows): uncond first

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        if self.scale == 1:
            return denoise(x, level)
        uncond, cond = denoise(torch.cat([x, x]), level).chunk(2)  # (B, C, h, w) each
        guided = torch.lerp(uncond, cond, self.scale)  # uncond + scale (cond - uncond)
        if not self.rescale:
            return guided
        # guided (1 + rescale (std(cond) / std(guided) - 1)), std over the values of an image
        deviation = cond.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True).clamp(min=1e-8)
        return guided * (1 + self.rescale * (deviation - 1))


class IntervalLimited(ClassifierFree):
    """Classifier-free guidance from timestep ``lowest`` to ``highest``, else the conditional prediction.

    Outside, only the conditional rows go through the network. Source: arXiv:2404.07724.
    """

    def __init__(
        self, scale: float = 5.0, lowest: float = 0.0, highest: float = 1000.0, rescale: float = 0.0
    ) -> None:
        super().__init__(scale, rescale)
        if not lowest < highest:
            raise ValueError(f"guidance interval: lowest {lowest:g} is not below highest {highest:g}")
        self.lowest, self.highest = lowest, highest

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        if self.lowest <= float(level.timestep) <= self.highest:
            return super().__call__(denoise, x, level)
        return denoise(x, level)


class Unguided:
    """The conditional prediction as it is."""

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        return cond

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        return denoise(x, level)


class Embedded:
    """The strength is an input of the network, as in distilled models: one row an image in every step.

    ``scale`` is in the convention of :class:`ClassifierFree`, which it stands for.
    Source: arXiv:2210.03142; official ``sampling.py:92`` (``cfg_cond_scale``).
    """

    def __init__(self, scale: float = 7.5) -> None:
        if not math.isfinite(scale):
            raise ValueError(f"guidance scale is {scale}, expected a finite number")
        self.scale = scale

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        return cond.guided(self.scale)

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        return denoise(x, level)

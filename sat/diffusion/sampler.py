"""Samplers: from noise at the first level to an image at the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from sat.diffusion.guidance import Denoise
from sat.diffusion.level import Level
from sat.diffusion.process import Process, ProcessContext

StepCallback = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, predicted x0 (B, C, h, w))."""


class Sampler(Protocol):
    """One contract for all: ``denoise(x, level) -> x0``."""

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        levels: Sequence[Level],
        process: Process,
        ctx: ProcessContext,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Unit noise (B, C, h, w) float32 -> latent of the same shape."""
        ...


class DDIM:
    """Deterministic: each step keeps the predicted noise and moves the predicted mean; the last returns x0.

    Equals the official ``ZeroSNRDDIMSampler`` on a zero-SNR schedule and ``EulerEDMSampler`` on an exploding
    one. Source: arXiv:2010.02502.
    """

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        levels: Sequence[Level],
        process: Process,
        ctx: ProcessContext,
        callback: StepCallback | None = None,
    ) -> Tensor:
        x = process.start(noise, levels[0], ctx)
        steps = len(levels) - 1
        for i in range(steps):
            x0 = denoise(x, levels[i])
            x = process.step(x, x0, levels[i], levels[i + 1], ctx)
            if callback is not None:
                callback(i + 1, steps, x0)
        return x

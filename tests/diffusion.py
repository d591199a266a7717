"""Gaussian data, for which the perfect denoiser and every path of the deterministic samplers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from sat.diffusion.draws import GeneratorDraws
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.samplers import Trajectory
from sat.diffusion.schedule import Level

SHAPE = (2, 3, 4, 5)


def level(alpha: float, sigma: float, ratio: float = 0.0) -> Level:
    """A level that the network sees as it is; its timestep is of no consequence."""
    return Level(alpha, sigma, 0.0, alpha, sigma, ratio)


def drawing(pictures: Sized, seed: int | None = None) -> GeneratorDraws:
    """Draws for as many pictures from one generator, with a ``seed`` of its own or torch's."""
    return GeneratorDraws(len(pictures), None if seed is None else torch.Generator().manual_seed(seed))


def exploding(noise: float) -> Level:
    """The level of alpha 1."""
    return level(1.0, noise)


def preserving(noise: float) -> Level:
    """The level of alpha^2 + sigma^2 = 1."""
    alpha = (1 + noise**2) ** -0.5
    return level(alpha, noise * alpha)


@dataclass(frozen=True)
class Gaussian:
    """x0 of independent normal values with mean ``mean`` and deviation ``deviation``; ``low`` with relay."""

    mean: float = 0.6
    deviation: float = 0.7
    low: float = 0.0

    def split(self, at: Level) -> tuple[float, float, float]:
        """Mean of x_t, the factor of x0 in it, and its deviation."""
        factor = at.alpha * (1 - at.relay_blend)
        offset = at.alpha * at.relay_blend * self.low + factor * self.mean
        return offset, factor, math.hypot(factor * self.deviation, at.sigma)

    def denoise(self, x: Tensor, at: Level) -> Tensor:
        """E[x0 | x_t]."""
        offset, factor, deviation = self.split(at)
        return self.mean + factor * self.deviation**2 / deviation**2 * (x - offset)

    def flow(self, x: Tensor, at: Level, next_level: Level) -> Tensor:
        """x carried by the probability flow from ``at`` to ``next_level``: it keeps the quantile."""
        offset, _, deviation = self.split(at)
        there, _, spread = self.split(next_level)
        return there + spread * (x - offset) / deviation


def drawn(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> Callable[[], Tensor]:
    """Unit noise from a generator of its own, float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def path(
    levels: list[Level],
    level_at_sigma: Callable[[float], Level] = exploding,
    process: Process | None = None,
    low: Tensor | None = None,
    shape: tuple[int, ...] = SHAPE,
) -> Trajectory:
    """A walk along ``levels`` with everything that any sampler asks for."""
    return Trajectory(levels, process or Process(), ProcessContext(low), level_at_sigma, drawn(shape=shape))

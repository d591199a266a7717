"""Relay diffusion: start from a noised low-resolution image instead of from noise alone."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sat.diffusion.process import (
    At,
    LevelAtSigma,
    Levels,
    Mean,
    ProcessContext,
    ProcessHooks,
    ProcessInput,
    Span,
)
from sat.diffusion.schedule import Level, Schedule
from sat.mixin import Mixin, replaces, wraps

Blend = Literal["linear", "sigma", "exp"]
"""The fading of the low-resolution image: with the timestep, with the noise, or along 1 - exp(-sin^4)."""


class RelayNoise(Mixin):
    """The mean moves from the image to ``ctx.low_res``, the latent of the upsampled low-resolution image.

    x_t = alpha ((1 - r) x0 + r low_res) + sigma eps over the first ``partial`` training timesteps; r is 0 at
    the image and 1 where relay starts. Sampling starts there, from low_res and noise, and its steps are those
    that a run over all timesteps would take in that part: 12 steps at ``partial`` 500 of 1000 are the last
    12 of 24. Training draws timesteps below ``partial``. Works over any schedule and any network. ``factor``
    is the enlargement: training makes its low-resolution image by shrinking and enlarging the image by it.

    Source: CogView3, arXiv:2403.05121, section 3.3; official ``loss.py:98-130``, ``sampling.py:455-506``.
    """

    host = ProcessHooks

    def __init__(self, partial: float = 500.0, blend: Blend = "linear", factor: int = 2) -> None:
        super().__init__()
        if not partial > 0:
            raise ValueError(f"relay: partial is {partial:g} timesteps, expected more than 0")
        if factor < 2:
            raise ValueError(f"relay: factor is {factor}, expected an enlargement of at least 2")
        self.partial, self.blend = partial, blend
        self.input = ProcessInput("low_res", factor)

    @wraps("mean")
    def mean(self, inner: Mean, x0: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        low_res = _low_res(ctx)
        return inner(x0 + level.relay_blend * (low_res - x0), level, ctx)  # mean((1 - r) x0 + r low_res)

    @replaces("start")
    def start(self, noise: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        return level.alpha * _low_res(ctx) + level.sigma * noise  # x_t at r = 1

    @wraps("levels")
    def levels(self, inner: Levels, schedule: Schedule, steps: int) -> list[Level]:
        if getattr(schedule, "spacing", None) == "karras":
            raise ValueError("relay takes trailing or leading spacing: karras has no steps to leave out")
        whole = steps_of_whole(steps, self.partial, schedule.total)
        taken = inner(schedule, whole)[-(steps + 1) :]
        first = self._start_sigma(taken[0].scaled_sigma)
        return [
            level._replace(relay_blend=self._blend((steps - i) / steps, level.scaled_sigma / first))
            for i, level in enumerate(taken)
        ]

    @wraps("level_at_sigma")
    def level_at_sigma(self, inner: LevelAtSigma, schedule: Schedule, sigma: float) -> Level:
        grid = [schedule.sigma_at(i) for i in range(self.span_of(schedule))]
        share = (float(np.interp(sigma, grid, np.arange(len(grid)))) + 1) / self.partial
        blend = self._blend(min(share, 1.0), min(sigma / grid[-1], 1.0))
        return inner(schedule, sigma)._replace(relay_blend=blend)

    @wraps("span")
    def span(self, inner: Span, schedule: Schedule) -> int:
        return min(inner(schedule), self.span_of(schedule))

    @wraps("at")
    def at(self, inner: At, schedule: Schedule, timestep: Tensor) -> Level:
        level = inner(schedule, timestep)
        t = timestep.float()[:, None, None, None]  # (B, 1, 1, 1)
        if self.blend == "linear":
            r = t / self.partial
        elif self.blend == "exp":
            r = _fade((t + 1) / self.partial)
        else:
            first = self._start_sigma(schedule.sigma_at(min(self.partial, schedule.total - 1)))
            r = torch.as_tensor(level.sigma) / torch.as_tensor(level.alpha) / first
        return level._replace(relay_blend=r.clamp(max=1.0))

    def span_of(self, schedule: Schedule) -> int:
        """Training timesteps that relay covers."""
        return min(math.ceil(self.partial), schedule.total)

    def _start_sigma(self, sigma: float) -> float:
        """``sigma``, the scaled noise where relay starts; a blend along infinite noise is an error."""
        if self.blend == "sigma" and math.isinf(sigma):
            raise ValueError(
                f"relay: the sigma blend needs some signal where it starts, and partial {self.partial:g} "
                f"reaches the timestep without any: take a smaller partial, or blend linear or exp"
            )
        return sigma

    def _blend(self, share: float, noise: float) -> float:
        """r where ``share`` of the relayed timesteps, or ``noise`` of the first level's, is still to go."""
        if self.blend == "linear":
            return share
        return noise if self.blend == "sigma" else float(_fade(share))


def steps_of_whole(steps: int, partial: float, total: int) -> int:
    """Steps over all ``total`` timesteps so that ``steps`` fall below ``partial``; an error if none fit."""
    whole = round(steps * total / partial)
    if steps > partial or abs(whole * partial / total - steps) > 1e-3 or whole > total:
        fits = [
            k
            for k in range(1, min(int(partial), 64) + 1)
            if abs(round(k * total / partial) * partial / total - k) <= 1e-3
        ]
        shown = ", ".join(map(str, fits[:12])) or "none"
        raise ValueError(
            f"{steps} steps do not fit the {partial:g} of {total} timesteps that relay covers: a run over "
            f"all timesteps must take a whole number of steps, at most one each (these fit: {shown}, …)"
        )
    return whole


def _fade(share: Any) -> Any:
    """(1 - exp(-sin^4(share pi / 2))) / (1 - 1/e), 0 at 0 and 1 at 1."""
    if isinstance(share, Tensor):
        return (1 - torch.exp(-(torch.sin(share * (math.pi / 2)) ** 4))) / (1 - math.exp(-1))
    return (1 - math.exp(-(math.sin(share * math.pi / 2) ** 4))) / (1 - math.exp(-1))


def _low_res(ctx: ProcessContext) -> Tensor:
    if ctx.low_res is None:
        raise ValueError("relay needs the low-resolution image's latent: give one (sampling.input_dir)")
    return ctx.low_res

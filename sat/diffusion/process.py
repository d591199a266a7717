"""The noising process: x_t = mean(x0, level) + sigma eps, one definition for training and for sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

from sat.diffusion.schedule import Level, Schedule
from sat.mixin import HookConflictError, Mixin, Resolved, resolve


@dataclass(frozen=True)
class ProcessInput:
    """The picture that a process needs beside noise; a mixin asks for it by an attribute ``input``.

    ``kind``: the field of :class:`ProcessContext` that holds its latent.
    ``factor``: the drawn picture is this many times larger, each way, than the given one.
    ``required``: sampling without it is an error.
    """

    kind: Literal["low_res"]
    factor: int = 1
    required: bool = True

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of the given picture, from those of the drawn one."""
        return height // self.factor, width // self.factor

    def enlarge(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, factor h, factor w), bilinear. Source: official ``sample_unet.py:188``."""
        return F.interpolate(image, scale_factor=float(self.factor), mode="bilinear", align_corners=False)

    def shrink(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H / factor, W / factor), bilinear: the given picture, for training."""
        return F.interpolate(image, scale_factor=1 / self.factor, mode="bilinear", align_corners=False)

    def consistent(self, drawn: Tensor, given: Tensor, rounds: int) -> Tensor:
        """``drawn`` (B, 3, H, W) in [0, 1], changed so that it shrinks to ``given`` (B, 3, h, w), nearly.

        Each round adds what is missing, enlarged. Source: iterative back-projection, Irani and Peleg, 1991.
        """
        for _ in range(rounds):
            missing, factor = given - self.shrink(drawn), float(self.factor)
            drawn = drawn + F.interpolate(missing, scale_factor=factor, mode="bicubic", align_corners=False)
        return drawn.clamp(0, 1)


@dataclass(frozen=True)
class ProcessContext:
    """Inputs of a process mixin besides x and the level."""

    low_res: Tensor | None = None  # (B, C, h, w) latent of the upsampled low-resolution image, for relay
    init: Tensor | None = None  # (B, C, h, w) latent of the picture that is changed
    noise: Tensor | None = None  # (B, C, h, w) unit noise that sampling started from
    mask: Tensor | None = None  # (B or 1, 1, h, w) 1 where it is drawn anew, 0 where it stays


class Mean(Protocol):
    """-> the noise-free part of x_t, (B, C, h, w); linear in x0."""

    def __call__(self, x0: Tensor, level: Level, ctx: ProcessContext) -> Tensor: ...


class Start(Protocol):
    """-> x at the first level, from unit noise (B, C, h, w)."""

    def __call__(self, noise: Tensor, level: Level, ctx: ProcessContext) -> Tensor: ...


class AfterStep(Protocol):
    """-> x (B, C, h, w) after a sampler has moved it to ``level``; as it is, unless a mixin changes it."""

    def __call__(self, x: Tensor, level: Level, ctx: ProcessContext) -> Tensor: ...


class Levels(Protocol):
    """-> the ``steps`` + 1 levels that sampling visits, from noise to data."""

    def __call__(self, schedule: Schedule, steps: int) -> list[Level]: ...


class LevelAtSigma(Protocol):
    """-> the level at noise sigma / alpha = ``sigma``, for samplers that evaluate between two levels."""

    def __call__(self, schedule: Schedule, sigma: float) -> Level: ...


class Span(Protocol):
    """-> the number of training timesteps that the process covers, counted from the clean end."""

    def __call__(self, schedule: Schedule) -> int: ...


class At(Protocol):
    """-> the training levels of integer timesteps (B,), as (B, 1, 1, 1) float32 tensors."""

    def __call__(self, schedule: Schedule, timestep: Tensor) -> Level: ...


@dataclass(frozen=True)
class ProcessHooks:
    """The extension points of a process.

    A mixin that needs a picture has an attribute ``input``, a ``ProcessInput``.
    """

    mean: Mean
    start: Start
    after_step: AfterStep
    levels: Levels
    level_at_sigma: LevelAtSigma
    span: Span
    at: At


PLAIN = ProcessHooks(
    mean=lambda x0, level, ctx: level.alpha * x0,
    start=lambda noise, level, ctx: noise * (level.alpha**2 + level.sigma**2) ** 0.5,
    after_step=lambda x, level, ctx: x,
    levels=lambda schedule, steps: schedule.levels(steps),
    level_at_sigma=lambda schedule, sigma: schedule.level_at_sigma(sigma),
    span=lambda schedule: schedule.total,
    at=lambda schedule, timestep: schedule.at(timestep),
)
"""Plain diffusion, for variance-preserving and exploding schedules alike."""


class Process(nn.Module):
    """Noising and its reversal: plain diffusion, with the hooks that mixins fill.

    ``input`` is the picture that a mixin asks for; None draws from noise alone.
    """

    def __init__(self, mixins: Mapping[str, Mixin] | None = None) -> None:
        super().__init__()
        mixins = mixins or {}
        self.mixins = nn.ModuleDict(mixins)
        self.resolved: Resolved[ProcessHooks] = resolve(PLAIN, mixins)
        self.hooks = self.resolved.hooks
        asked = {name: getattr(mixin, "input", None) for name, mixin in mixins.items()}
        inputs = {name: given for name, given in asked.items() if isinstance(given, ProcessInput)}
        if len(set(inputs.values())) > 1:
            raise HookConflictError(f"mixins {list(inputs)} need different input pictures: keep one of them")
        self.input: ProcessInput | None = next(iter(inputs.values()), None)

    def extended(self, mixins: Mapping[str, Mixin]) -> Process:
        """This process with ``mixins`` around those it has; this one stays as it is."""
        return Process({**cast("dict[str, Mixin]", dict(self.mixins.items())), **mixins})

    def noise(self, x0: Tensor, eps: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        """x_t (B, C, h, w) of training, from clean latents and unit noise of that shape."""
        return self.hooks.mean(x0, level, ctx) + level.sigma * eps  # x_t = mean(x0) + sigma eps

    def noise_seen(self, x0: Tensor, eps: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        """Everything in x_t that is not x0, as if it were noise: (x_t - alpha x0) / sigma.

        ``eps`` itself in plain diffusion. A network that predicts this predicts x0.
        """
        return eps + (self.hooks.mean(x0, level, ctx) - level.alpha * x0) / level.sigma

    def start(self, noise: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        """x at the first level of sampling, from unit noise (B, C, h, w)."""
        return self.hooks.start(noise, level, ctx)

    def step(self, x: Tensor, x0: Tensor, level: Level, next_level: Level, ctx: ProcessContext) -> Tensor:
        """x (B, C, h, w) at ``next_level``: keep the predicted noise, move the predicted mean.

        This is the official Euler, zero-SNR DDIM and relay step in one (DDIM, arXiv:2010.02502 eq. 12 with
        eta 0).
        """
        # x' = mean(x0, level') + (sigma' / sigma) (x - mean(x0, level))
        keep = next_level.sigma / level.sigma
        return self.hooks.mean(x0, next_level, ctx) + keep * (x - self.hooks.mean(x0, level, ctx))

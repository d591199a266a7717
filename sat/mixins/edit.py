"""Changing a given picture: image-to-image, inpainting, and a strength for each place.

Process mixins for one run, put around those that the model has (:meth:`Edit.around`): they see levels and
latents, and neither samplers nor networks know of them. Letters: z0 the given picture's latent, eps the noise
that the run starts from, m a mask (1 = draw anew), share a level's share of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sat.diffusion.process import AfterStep, Levels, Process, ProcessContext, ProcessHooks, Start
from sat.diffusion.schedule import Level, Schedule
from sat.mixin import Mixin, wraps

StrengthBy = Literal["noise", "steps"]
"""The meaning of a strength S: the noise share of the first level, or the share of the steps (diffusers)."""

_SLACK = 1e-6  # of shares that are compared


def levels_from(
    whole: list[Level], strength: float, by: StrengthBy, level_at_sigma: Callable[[float], Level]
) -> list[Level]:
    """Those of the ``whole`` run's levels that an edit of ``strength`` visits, from noise to data.

    By ``noise``: the level whose noise share is ``strength``, in front of those below it. By ``steps``: the
    last ``strength`` of the steps, rounded up, as diffusers' newer pipelines count them. At least one step;
    strength 0 is the last level alone.
    """
    if strength <= _SLACK:
        return [whole[-1]]
    if by == "steps":
        steps = len(whole) - 1
        return whole[steps - math.ceil(strength * steps - _SLACK) :]
    below = [level for level in whole if level.noise_share < strength - _SLACK]
    if len(below) == len(whole):  # the run starts below it: relay, or a schedule that keeps some signal
        return whole
    return [level_at_sigma(strength / math.sqrt(1 - strength**2)), *below]


class FromPicture(Mixin):
    """Starts at an earlier level than noise alone, from the given picture: x = mean(z0) + sigma eps.

    ``process`` holds the hooks it is put around. Source: SDEdit, arXiv:2108.01073.
    """

    host = ProcessHooks

    def __init__(self, process: ProcessHooks, strength: float, by: StrengthBy) -> None:
        super().__init__()
        self.process, self.strength, self.by = process, strength, by

    @wraps("levels")
    def levels(self, inner: Levels, schedule: Schedule, steps: int) -> list[Level]:
        return levels_from(
            inner(schedule, steps),
            self.strength,
            self.by,
            lambda sigma: self.process.level_at_sigma(schedule, sigma),
        )

    @wraps("start")
    def start(self, inner: Start, noise: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        return noised(self.process, level, replace(ctx, noise=noise))


class KeepOutside(Mixin):
    """Outside the mask, the given picture at each level's noise: x = (1 - m) (mean(z0) + sigma eps) + m x.

    After the last step, where sigma is 0, that is z0 itself. With ``share``, the mask is a map of strengths:
    a place is held until the run's last level at or above its own, m = [map > share(level)].
    Sources: arXiv:2201.09865, eq. 8, with the noise of the start throughout; differential diffusion,
    arXiv:2306.00950.
    """

    host = ProcessHooks

    def __init__(self, process: ProcessHooks, share: Callable[[Level], float] | None = None) -> None:
        super().__init__()
        self.process, self.share = process, share

    @wraps("start")
    def start(self, inner: Start, noise: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        return self._blended(inner(noise, level, ctx), level, ctx)

    @wraps("after_step")
    def after_step(self, inner: AfterStep, x: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        return self._blended(inner(x, level, ctx), level, ctx)

    def _blended(self, x: Tensor, level: Level, ctx: ProcessContext) -> Tensor:
        assert ctx.mask is not None, "the edit's context has it"
        mask = ctx.mask
        if self.share is not None:
            mask = (mask > self.share(level) + _SLACK).to(x.dtype)
        return torch.lerp(noised(self.process, level, ctx), x, mask)  # (1 - m) z_t + m x


def noised(process: ProcessHooks, level: Level, ctx: ProcessContext) -> Tensor:
    """The given picture at a level: mean(z0) + sigma eps, (B, C, h, w)."""
    if ctx.init is None or ctx.noise is None:
        raise ValueError("changing a picture needs its latent and the noise of the start")
    return process.mean(ctx.init, level, ctx) + level.sigma * ctx.noise


@dataclass(frozen=True)
class Edit:
    """A picture to change, for :meth:`sat.engine.DiffusionEngine.sample`.

    ``strength`` 0 returns ``init``; 1 draws from noise as without it, in the mask if there is one.
    ``mask`` is 1 where the picture is drawn anew and 0 where it stays. With ``is_map``, it is a map instead
    whose values, times ``strength``, are each place's own strength.
    """

    init: Tensor  # (B, C, h, w) float32 latent of the picture
    strength: float = 1.0
    by: StrengthBy = "noise"
    mask: Tensor | None = None  # (B or 1, 1, h, w) float32 in [0, 1]
    is_map: bool = False

    def around(self, process: Process, schedule: Schedule, steps: int) -> Process:
        """``process`` with the mixins of this edit around its own."""
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength:g}, expected 0 to 1")
        mixins: dict[str, Mixin] = {}
        if self.strength < 1:
            mixins["from_picture"] = FromPicture(process.hooks, self.strength, self.by)
        if self.mask is not None:
            whole = process.hooks.levels(schedule, steps)
            share = (
                ((lambda level: level.noise_share) if self.by == "noise" else steps_left(whole))
                if self.is_map
                else None
            )
            mixins["keep_outside"] = KeepOutside(process.hooks, share)
        return process.extended(mixins)

    def context(self, ctx: ProcessContext, noise: Tensor) -> ProcessContext:
        """``ctx`` with this edit's tensors, for a run that starts from ``noise``."""
        mask = self.mask
        if mask is not None and self.is_map:
            mask = mask * self.strength
        return replace(ctx, init=self.init, noise=noise.float(), mask=mask)


def steps_left(whole: list[Level]) -> Callable[[Level], float]:
    """The share of a run's steps that a level still has before it, between two by their noise share."""
    shares = [level.noise_share for level in whole[::-1]]
    left = np.linspace(0, 1, len(whole))
    return lambda level: float(np.interp(level.noise_share, shares, left))


# -- masks of pixels on latent cells


def latent_mask(mask: Tensor, factor: int, grow: int = 0, feather: int = 0) -> Tensor:
    """(B, 1, H, W) of pixels in [0, 1] -> (B, 1, H / factor, W / factor): the largest value in each cell.

    It is then ``grow`` cells larger all around, and falls off linearly over the 2 ``feather`` cells beyond.
    """
    cells = F.max_pool2d(mask, factor)
    reach = grow + feather
    if reach:
        cells = F.max_pool2d(cells, 2 * reach + 1, stride=1, padding=reach)
    for window in ((2 * feather + 1, 1), (1, 2 * feather + 1)) if feather else ():
        padding = (window[1] // 2, window[1] // 2, window[0] // 2, window[0] // 2)
        cells = F.avg_pool2d(F.pad(cells, padding, mode="replicate"), window, stride=1)
    return cells

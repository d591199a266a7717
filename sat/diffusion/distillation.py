"""Targets of distillation: progressive, consistency (sCM) and distribution matching (DMD), in terms of x0.

All are written with the process's own mean and step, so they hold for plain diffusion and relay over
exploding, preserving and flow schedules alike. The angle of a level is t = atan(sigma / alpha): 0 at the
picture, pi / 2 at noise alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel

from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Level, Schedule

SMALLEST_GAIN = 1e-4
"""A step that passes on less of x0 than this teaches nothing: its target would be rounding errors."""


class LevelTable:
    """Sampling levels as tensors, to look up one for each image of a batch."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self._table = torch.tensor(
            [[float(value) for value in level] for level in levels], dtype=torch.float64
        )

    def at(self, places: Tensor, dtype: torch.dtype = torch.float32) -> Level:
        """The levels at ``places`` (B,), each field (B, 1, 1, 1) but the timestep, which is (B,)."""
        self._table = self._table.to(places.device)  # once
        rows = self._table[places].to(dtype)
        fields: Any = {name: rows[:, i, None, None, None] for i, name in enumerate(Level._fields)}
        return Level(**{**fields, "timestep": rows[:, Level._fields.index("timestep")]})


def student_target(
    process: Process, x: Tensor, arrived: Tensor, level: Level, next_level: Level, ctx: ProcessContext
) -> Tensor:
    """The x0 (B, C, h, w) for which one step from ``x`` at ``level`` reaches ``arrived`` at ``next_level``.

    The sampler's step is affine in x0, step(x, x0) = gain x0 + rest, whatever the process (plain or relay,
    exploding or preserving): both are read off the step itself. In float64, since the gain falls as steps
    get short. Source: arXiv:2202.00512, section 3; CogView3, arXiv:2403.05121, eq. 8 and 9.
    """
    wide = replace(ctx, low_res=None if ctx.low_res is None else ctx.low_res.double())
    level, next_level = _double(level), _double(next_level)
    x, arrived = x.double(), arrived.double()
    rest = process.step(x, torch.zeros_like(x), level, next_level, wide)
    gain = process.step(x, torch.ones_like(x), level, next_level, wide) - rest
    return (arrived - rest) / gain


def step_gain(process: Process, level: Level, next_level: Level) -> float:
    """The share of a change of x0 that one step from ``level`` to ``next_level`` passes on."""
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    ctx = ProcessContext(nothing)
    rest = process.step(nothing, nothing, level, next_level, ctx)
    return float(process.step(nothing, nothing + 1, level, next_level, ctx) - rest)


def _double(level: Level) -> Level:
    return Level(*(value.double() if isinstance(value, Tensor) else value for value in level))


# -- consistency: every level's x0 is that of the level next to it, on the teacher's path


def angle(level: Level) -> Tensor:
    """t = atan(sigma / alpha), of the level's own shape; float64 of numbers."""
    if isinstance(level.sigma, Tensor):
        return torch.atan2(level.sigma, torch.as_tensor(level.alpha).to(level.sigma))
    return torch.tensor(math.atan2(level.sigma, level.alpha), dtype=torch.float64)


def few_levels(process: Process, schedule: Schedule, steps: int) -> list[Level]:
    """Levels of a run of few ``steps``, trailing where the schedule's own last step is a sliver.

    In two steps ``linspace`` visits timesteps ``total`` and 1, and the second changes nothing.
    """
    if getattr(schedule, "spacing", None) == "linspace":
        schedule = copy.copy(schedule)
        schedule.spacing = "trailing"  # type: ignore[attr-defined]
    return process.hooks.levels(schedule, steps)


def nearer_levels(process: Process, schedule: Schedule, gap: float) -> tuple[list[Level], list[Level]]:
    """The training levels, and for each the one whose angle is smaller by ``gap``, at most by half.

    The network's timestep, and relay's blend, lie between those of the two training levels around it.
    """
    span = process.hooks.span(schedule)
    with unset_fake_temporarily():  # an estimate makes tensors without data, and these are looked at
        rows = process.hooks.at(schedule, torch.arange(span))
        told, blends = (
            np.broadcast_to(np.asarray(v, float).ravel(), span) for v in (rows.timestep, rows.relay_blend)
        )
    angles = np.arctan([schedule.sigma_at(i) for i in range(span)])

    def at(t: float) -> Level:
        level = process.hooks.level_at_sigma(schedule, math.tan(t))
        timestep, blend = (float(np.interp(t, angles, values)) for values in (told, blends))
        return Level(level.alpha, level.sigma, timestep, level.alpha, level.sigma, blend)

    return [at(t) for t in angles], [at(t) for t in angles - np.minimum(gap, angles / 2)]


def derivative(
    denoise: Callable[[Tensor, Level], Tensor], x: Tensor, level: Level, dx: Tensor, slope: Level
) -> tuple[Tensor, Tensor]:
    """x0 (B, C, h, w) at ``level``, and its exact derivative along ``dx`` and the ``slope`` of the level.

    By torch's jvp, with torch's plain attention: the others have no forward derivative. Raises
    :class:`NotImplementedError` for a network with an operator that has none.
    """
    fields = tuple(torch.as_tensor(value) for value in level)
    slopes = tuple(torch.as_tensor(value).to(field) for value, field in zip(slope, fields, strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        x0, change, *_ = torch.func.jvp(
            lambda x, *fields: denoise(x, Level(*fields)), (x, *fields), (dx, *slopes)
        )
    return x0, change


NORM_FLOOR = 0.1
"""c of |g| + c in a tangent's denominator. Source: arXiv:2410.11081, section 4.2."""


def tangent(x0: Tensor, teacher: Tensor, change: Tensor, level: Level, warm: float | Tensor = 1.0) -> Tensor:
    """Derivative of a student's x0 along the teacher's path, which is 0 in a consistent student.

    ``x0`` and ``teacher`` are the two predictions at ``level``, ``change`` is the student's dx0/dt (B, C, h,
    w). ``warm`` below 1 takes that share of the part that is differentiated through the network; at 0 the
    student follows the teacher. Source: sCM, arXiv:2410.11081, eq. 6 and algorithm 1, there times cos t,
    which would leave out the level of noise alone that one-step models draw from.
    """
    # dx0/dt = -cos t (F - F_teacher) - sin t (x + dF/dt), with F - F_teacher = (teacher - x0) / sin t
    t = angle(level).to(x0)
    follow = -torch.cos(t) / torch.sin(t) * (teacher - x0)
    return follow + warm * (change - follow)


def consistency_target(x0: Tensor, g: Tensor, level: Level) -> Tensor:
    """The x0 (B, C, h, w) that ``x0`` is drawn to by the tangent ``g``, of which the length hardly counts.

    An error of it by 1 / sin^2 t is that of the TrigFlow network F: |F - F^- - g / (|g| + c)|^2, |g| the root
    mean square over a picture. Pictures whose tangent is not finite stay as they are.
    """
    g = torch.where(torch.isfinite(g).all(dim=(1, 2, 3), keepdim=True), g, 0.0)
    length = g.square().mean((1, 2, 3), keepdim=True).sqrt()
    return x0 - torch.sin(angle(level).to(x0)) * g / (length + NORM_FLOOR)


# -- distribution matching: from the scores of the student's pictures to those of the teacher's


def matching_target(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The x0 (B, C, h, w) that a student's ``x0`` is drawn to: x0 - (fake - real) / mean |x0 - real|.

    ``real`` and ``fake`` are predictions of x0 from ``x0`` noised, by the teacher and by a network trained on
    the student's pictures. Their difference is that of the scores times sigma^2 / alpha, whatever the
    process's mean. Source: DMD2, arXiv:2405.14867, section 3; DMD, arXiv:2311.18828, eq. 7 and 8.
    """
    weight = (x0 - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return x0 - (fake - real) / weight

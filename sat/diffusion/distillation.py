"""Progressive distillation: the x0 that takes a student in one step to the end of a teacher's two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Level

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

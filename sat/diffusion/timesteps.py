"""Chances of the training timesteps, other than all alike."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from sat.diffusion.schedule import Schedule


class Timesteps(Protocol):
    """Chances of the timesteps in training. The loss is not divided by them: what comes often counts."""

    def chances(self, schedule: Schedule, span: int) -> Tensor:
        """(span,) float64 chances of the timesteps 0 … span - 1, which add up to 1."""
        ...


class LogitNormal:
    """Share s of the span with logit(s) normal: ``mean`` 0 favours the middle, more than 0 noisier levels.

    Source: arXiv:2403.03206, section 3.1.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        _check("LogitNormal", mean, std)
        self.mean, self.std = mean, std

    def chances(self, schedule: Schedule, span: int) -> Tensor:
        """(span,) float64: the normal's mass between logit(t / span) and logit((t + 1) / span)."""
        edges = torch.logit(torch.arange(span + 1, dtype=torch.float64) / span)
        below: Tensor = torch.special.ndtr((edges - self.mean) / self.std)
        return below.diff()


class LogSNR:
    """Even in log(alpha^2 / sigma^2), or normal in it around ``mean``, within the levels of the schedule.

    A timestep stands for the values nearest to its own; a level without signal lies as far below its
    neighbour as that below the next. EDM's levels (log sigma around -1.2, deviation 1.2) are ``mean`` 2.4,
    ``std`` 2.4. Source: arXiv:2206.00364, table 1.
    """

    def __init__(self, mean: float | None = None, std: float | None = None) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"LogSNR: mean {mean} and std {std}: expected both (normal) or neither (even)")
        if mean is not None and std is not None:
            _check("LogSNR", mean, std)
        self.mean, self.std = mean, std

    def chances(self, schedule: Schedule, span: int) -> Tensor:
        """(span,) float64: the mass between the middles of neighbouring values."""
        if span == 1:
            return torch.ones(1, dtype=torch.float64)
        sigma = torch.tensor([schedule.sigma_at(t) for t in range(span)], dtype=torch.float64)
        value = -2 * sigma.log()  # (span,), descending
        if not math.isfinite(value[-1]):
            value[-1] = 2 * value[-2] - value[-3] if span > 2 else value[-2] - 1
        middle = (value[1:] + value[:-1]) / 2
        edges = torch.cat([2 * value[:1] - middle[:1], middle, 2 * value[-1:] - middle[-1:]])
        mass = edges
        if self.mean is not None and self.std is not None:
            mass = torch.special.ndtr((edges - self.mean) / self.std)
        mass = mass[:-1] - mass[1:]
        if not mass.sum() > 0:
            raise ValueError(
                f"LogSNR: no level is near mean {self.mean:g} with std {self.std:g}: the schedule's log SNR "
                f"goes from {value[-1]:.3g} to {value[0]:.3g}"
            )
        return mass / mass.sum()


class Mode:
    """Times u drawn as f(u) = 1 - u - ``scale`` (cos^2(pi u / 2) - 1 + u), u even: more of the middle.

    Source: arXiv:2403.03206, section 3.1 (mode sampling with heavy tails), where 1.29 is used.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"Mode: scale is {scale:g}, expected -1 to {2 / (math.pi - 2):.4g}")
        self.scale = scale

    def chances(self, schedule: Schedule, span: int) -> Tensor:
        """(span,) float64: the mass of f between t / span and (t + 1) / span, by bisection (f falls)."""
        low = torch.zeros(span + 1, dtype=torch.float64)
        high, edges = torch.ones_like(low), torch.arange(span + 1, dtype=torch.float64) / span
        for _ in range(60):  # f(u) = edge
            u = (low + high) / 2
            f = 1 - u - self.scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
            low, high = torch.where(f > edges, u, low), torch.where(f > edges, high, u)
        root = (low + high) / 2
        root[0], root[-1] = 1, 0  # f is flat at its ends at the outermost scales
        return -root.diff()


def _check(name: str, mean: float, std: float) -> None:
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"{name}: mean {mean:g}, std {std:g}: expected finite numbers and std more than 0")

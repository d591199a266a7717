"""Samplers: from noise at the first level to an image at the last.

All are written in the process's own terms, x = mean(x0, level) + sigma eps, so each works with every schedule
(exploding, preserving, zero-SNR) and with relay. Where alpha is 1 they are the k-diffusion samplers of the
official code. From a first level without any signal every sampler's step is the plain one of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sat.diffusion.guidance import Denoise
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Level
from sat.errors import UserError

StepCallback = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, predicted x0 (B, C, h, w))."""


class SamplerError(UserError, ValueError):
    """A sampler lacks what its steps need."""

    exit_code = 1


def _no_noise_sampler() -> Tensor:
    raise SamplerError("this sampler draws noise at its steps: give the images' generators")


def _no_level_at_sigma(sigma: float) -> Level:
    raise SamplerError("this sampler evaluates between two levels: give the schedule's `level_at_sigma`")


@dataclass(frozen=True)
class Trajectory:
    """The levels that a sampler visits, and the process they belong to.

    ``level_at_sigma`` gives the level at a noise sigma / alpha, ``noise_sampler`` draws unit noise.
    """

    levels: Sequence[Level]
    process: Process
    ctx: ProcessContext = field(default_factory=ProcessContext)
    level_at_sigma: Callable[[float], Level] = _no_level_at_sigma
    noise_sampler: Callable[[], Tensor] = _no_noise_sampler

    @property
    def steps(self) -> int:
        """Steps from the first level to the last."""
        return len(self.levels) - 1

    def start(self, noise: Tensor) -> Tensor:
        """x at the first level."""
        return self.process.start(noise, self.levels[0], self.ctx)

    def step(  # noqa: PLR0913 - the symbols of a step
        self,
        x: Tensor,
        x0: Tensor,
        level: Level,
        next_level: Level,
        sigma_up: float = 0.0,
        noise: float = 1.0,
    ) -> Tensor:
        """x at ``next_level``: the predicted noise kept, but for ``sigma_up`` of it, which is drawn anew.

        ``noise`` scales what is drawn.
        """
        x = self.process.step(x, x0, level, _lowered(next_level, sigma_up), self.ctx)
        if sigma_up:
            x = x + sigma_up * (noise * self.noise_sampler())
        return self.process.hooks.after_step(x, next_level, self.ctx)

    def eps(self, x: Tensor, x0: Tensor, level: Level) -> Tensor:
        """The noise in x that goes with a predicted x0: (x - mean(x0)) / sigma."""
        return (x - self.process.hooks.mean(x0, level, self.ctx)) / level.sigma

    def move(self, x: Tensor, x0: Tensor, eps: Tensor, level: Level, next_level: Level) -> Tensor:
        """x moved from ``level`` to ``next_level`` along given x0 and noise, whatever x holds itself."""
        mean = self.process.hooks.mean
        moved = mean(x0, next_level, self.ctx) - mean(x0, level, self.ctx)
        x = x + moved + (next_level.sigma - level.sigma) * eps
        return self.process.hooks.after_step(x, next_level, self.ctx)


class Sampler(Protocol):
    """One contract for all: ``denoise(x, level) -> x0``."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        """Unit noise (B, C, h, w) float32 -> latent of the same shape."""
        ...


def _sigma_up(level: Level, next_level: Level, eta: float) -> float:
    """Noise of ``next_level`` that an ancestral step draws anew; none from pure noise and at the last step.

    sigma_up = eta sigma' sqrt(1 - (r' / r)^2), with r = sigma / alpha. Source: arXiv:2010.02502, eq. 16.
    """
    if not level.alpha or not next_level.sigma or not eta:
        return 0.0
    fraction, sigma = next_level.scaled_sigma / level.scaled_sigma, float(next_level.sigma)
    return min(sigma, eta * sigma * math.sqrt(max(1 - fraction**2, 0.0)))


def _lowered(level: Level, sigma_up: float) -> Level:
    """``level`` with the noise that is not drawn anew: sigma_down = sqrt(sigma^2 - sigma_up^2)."""
    if not sigma_up:
        return level
    return level._replace(sigma=math.sqrt(max(float(level.sigma) ** 2 - sigma_up**2, 0.0)))


class DDIM:
    """Each step keeps the predicted noise and moves the predicted mean; the last returns x0.

    ``eta`` 0 is deterministic: the official ``ZeroSNRDDIMSampler`` on a zero-SNR schedule, the
    ``EulerEDMSampler`` on an exploding one, ``LinearRelayEDMSampler`` with relay. ``eta`` up to 1 draws part
    of the noise anew. Source: arXiv:2010.02502, eq. 12 and 16. ``share`` draws that share of the next level's
    noise anew instead: the official ``DDIMSampler``, 0.1 by default.
    """

    def __init__(self, eta: float = 0.0, share: float = 0.0) -> None:
        if not (0 <= eta <= 1 and 0 <= share <= 1) or (eta and share):
            raise ValueError(f"DDIM: eta {eta:g} and share {share:g} are 0 to 1, and one of them is 0")
        self.eta, self.share = eta, share

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x0 = denoise(x, level)
            sigma_up = _sigma_up(level, next_level, self.eta)
            if self.share and level.alpha:
                sigma_up = self.share * float(next_level.sigma)
            x = path.step(x, x0, level, next_level, sigma_up)
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class Renoise:
    """Noise drawn anew in full between predictions, for consistency models and other few-step students.

    x = mean(x0, level') + sigma' eps at every step, also from noise alone, where ancestral samplers keep what
    they started from. The last step returns x0. Source: arXiv:2303.01469, algorithm 1 (multistep sampling).
    """

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x0 = denoise(x, level)
            x = path.step(x, x0, level, next_level, float(next_level.sigma))
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class EulerAncestral:
    """DDIM's stochastic step as k-diffusion words it; ``noise`` scales what is drawn. ``eta`` 1 is DDPM.

    Source: official ``EulerAncestralSampler``; the split of the noise is that of arXiv:2010.02502 eq. 16.
    """

    def __init__(self, eta: float = 1.0, noise: float = 1.0) -> None:
        self.eta, self.noise = eta, noise

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x0 = denoise(x, level)
            sigma_up = _sigma_up(level, next_level, self.eta)
            x = path.step(x, x0, level, next_level, sigma_up, self.noise)
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class DPMSolver2SAncestral:
    """DPM-Solver++ of order 2, single step, with noise drawn anew: two evaluations a step, one at the last.

    Source: arXiv:2211.01095, algorithm 1; official ``DPMPP2SAncestralSampler``.
    """

    def __init__(self, eta: float = 1.0, noise: float = 1.0) -> None:
        self.eta, self.noise = eta, noise

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x0 = x0_middle = denoise(x, level)
            sigma_up = _sigma_up(level, next_level, self.eta)
            lowered = _lowered(next_level, sigma_up)
            if level.alpha and lowered.sigma:
                middle = path.level_at_sigma(math.sqrt(level.scaled_sigma * lowered.scaled_sigma))
                x0_middle = denoise(path.step(x, x0, level, middle), middle)
            x = path.step(x, x0_middle, level, next_level, sigma_up, self.noise)
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class _Churned:
    """Raises the noise before a step: ``churn`` in all over the steps between two noise levels.

    ``lowest`` and ``highest`` are sigma / alpha; ``noise`` scales what is drawn.
    Source: arXiv:2206.00364, algorithm 2; official ``EDMSampler``.
    """

    def __init__(
        self, churn: float = 0.0, lowest: float = 0.0, highest: float = math.inf, noise: float = 1.0
    ) -> None:
        if churn < 0:
            raise ValueError(f"churn is {churn:g}, expected at least 0")
        self.churn, self.lowest, self.highest, self.noise = churn, lowest, highest, noise

    def raised(self, x: Tensor, level: Level, path: Trajectory) -> tuple[Tensor, Level]:
        """x and its level with more noise: sigma_hat = (1 + gamma) sigma, where alpha is 1."""
        if not level.alpha or not self.lowest <= level.scaled_sigma <= self.highest:
            return x, level
        gamma = min(self.churn / path.steps, math.sqrt(2) - 1)
        if not gamma > 0:
            return x, level
        hat = path.level_at_sigma(level.scaled_sigma * (1 + gamma))
        hat = hat._replace(relay_blend=level.relay_blend)  # noise leaves relay's blend as it is
        keep = float(hat.alpha) / float(level.alpha)
        added = math.sqrt(max(float(hat.sigma) ** 2 - (keep * float(level.sigma)) ** 2, 0.0))
        return keep * x + added * self.noise * path.noise_sampler(), hat


class Euler(_Churned):
    """First order, deterministic at ``churn`` 0, where it equals DDIM.

    Source: official ``EulerEDMSampler``.
    """

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x, level = self.raised(x, level, path)
            x0 = denoise(x, level)
            x = path.step(x, x0, level, next_level)
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class Heun(_Churned):
    """Second order: the slopes at both ends of a step, averaged; two evaluations a step, one at the last.

    Source: arXiv:2206.00364, algorithm 1; official ``HeunEDMSampler``.
    """

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x, level = self.raised(x, level, path)
            x0 = denoise(x, level)
            x_next = path.step(x, x0, level, next_level)
            if level.alpha and next_level.sigma:
                x0_next = denoise(x_next, next_level)
                eps = (path.eps(x, x0, level) + path.eps(x_next, x0_next, next_level)) / 2
                x_next = path.move(x, (x0 + x0_next) / 2, eps, level, next_level)
            x = x_next
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class DPMSolver2M:
    """DPM-Solver++ of order 2 with a memory of one prediction: one evaluation a step, deterministic.

    On a zero-SNR schedule the first step, from pure noise, is of first order, as is the last.
    Source: arXiv:2211.01095, algorithm 2; official ``DPMPP2MSampler``.
    """

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        x0_last, lambda_last = None, 0.0  # of the step before; lambda = log(alpha / sigma)
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x0 = d = denoise(x, level)
            lambda_now = -math.log(level.scaled_sigma) if level.alpha else None
            if x0_last is not None and lambda_now is not None and next_level.sigma:
                h_last = lambda_now - lambda_last
                h = -math.log(next_level.scaled_sigma) - lambda_now
                d = x0 + (x0 - x0_last) * (h / (2 * h_last))
            x = path.step(x, d, level, next_level)
            if lambda_now is not None:
                x0_last, lambda_last = x0, lambda_now
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


class _Evaluation(NamedTuple):
    """One step's prediction, as a multistep sampler remembers it."""

    sigma: float  # sigma / alpha
    x0: Tensor
    eps: Tensor


class LinearMultistep:
    """Adams-Bashforth in sigma / alpha over the last ``order`` predicted noises: one evaluation a step.

    Deterministic. Exact for polynomials of that noise; with relay x0 is extrapolated alike. A first level
    without any signal is left out of the memory. Source: official ``LinearMultistepSampler``.
    """

    def __init__(self, order: int = 4) -> None:
        if order < 1:
            raise ValueError(f"LinearMultistep: order is {order}, expected at least 1")
        self.order = order

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.start(noise)
        seen: list[_Evaluation] = []  # the newest first
        for i, (level, next_level) in enumerate(pairwise(path.levels)):
            x0 = denoise(x, level)
            if level.alpha:
                sigma, next_sigma = level.scaled_sigma, next_level.scaled_sigma
                seen = [_Evaluation(sigma, x0, path.eps(x, x0, level)), *seen[: self.order - 1]]
                weights = _adams(sigma, next_sigma, [e.sigma for e in seen])
                mean_x0 = torch.stack([w * e.x0 for w, e in zip(weights, seen, strict=True)]).sum(0)
                mean_eps = torch.stack([w * e.eps for w, e in zip(weights, seen, strict=True)]).sum(0)
                # One step in the scale where alpha is 1.
                ends = (
                    level._replace(alpha=1.0, sigma=sigma),
                    next_level._replace(alpha=1.0, sigma=next_sigma),
                )
                x = float(next_level.alpha) * path.move(x / level.alpha, mean_x0, mean_eps, *ends)
            else:
                x = path.step(x, x0, level, next_level)
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


def _adams(start: float, end: float, nodes: Sequence[float]) -> list[float]:
    """Shares of the ``nodes`` in the mean over [end, start] of the polynomial through values at them."""
    shares = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        basis = np.poly1d(others, r=True) if others else np.poly1d([1.0])
        whole = basis.integ()
        scale = np.prod([node - other for other in others]) * (end - start)
        shares.append(float((whole(end) - whole(start)) / scale))
    return shares

"""Samplers: from noise at the first level to an image at the last.

All are written in the process's own terms, x = mean(x0, level) + sigma eps, so each works with every schedule
(exploding, preserving, zero-SNR) and with relay. Where alpha is 1 they are the k-diffusion samplers of the
official code. From a first level without any signal every sampler's step is the plain one of first order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sat.diffusion.guidance import Denoise
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Level

StepCallback = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, predicted x0 (B, C, h, w))."""


class SamplerError(ValueError):
    """A sampler cannot do what is asked of it."""


def _no_noise() -> Tensor:
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
    noise_sampler: Callable[[], Tensor] = _no_noise

    @property
    def steps(self) -> int:
        """Steps from the first level to the last."""
        return len(self.levels) - 1

    def step(self, x: Tensor, x0: Tensor, now: Level, to: Level) -> Tensor:
        """x at ``to``, the predicted noise kept."""
        return self.process.step(x, x0, now, to, self.ctx)

    def eps(self, x: Tensor, x0: Tensor, level: Level) -> Tensor:
        """The noise in x that goes with a predicted x0."""
        return (x - self.process.hooks.mean(x0, level, self.ctx)) / level.sigma

    def move(self, x: Tensor, x0: Tensor, eps: Tensor, now: Level, to: Level) -> Tensor:
        """x moved from ``now`` to ``to`` along given x0 and noise, whatever x holds itself."""
        mean = self.process.hooks.mean
        return x + (mean(x0, to, self.ctx) - mean(x0, now, self.ctx)) + (to.sigma - now.sigma) * eps


class Sampler(Protocol):
    """One contract for all: ``denoise(x, level) -> x0``."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        """Unit noise (B, C, h, w) float32 -> latent of the same shape."""
        ...


class _Step(NamedTuple):
    """What one step gives: the new x, and the first prediction of x0, for previews."""

    x: Tensor
    x0: Tensor


class _Stepwise:
    """A sampler whose steps know nothing of one another."""

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.process.start(noise, path.levels[0], path.ctx)
        for i in range(path.steps):
            now, to = path.levels[i], path.levels[i + 1]
            x, x0 = (
                self.advance(denoise, x, now, to, path) if now.alpha else _plain(denoise, x, now, to, path)
            )
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x

    def advance(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        """One step from ``now`` to ``to``."""
        raise NotImplementedError


def _plain(denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
    x0 = denoise(x, now)
    return _Step(path.step(x, x0, now, to), x0)


class DDIM(_Stepwise):
    """Each step keeps the predicted noise and moves the predicted mean; the last returns x0.

    ``eta`` 0 is deterministic: the official ``ZeroSNRDDIMSampler`` on a zero-SNR schedule, the
    ``EulerEDMSampler`` on an exploding one, ``LinearRelayEDMSampler`` with relay. ``eta`` up to 1 draws part
    of the noise anew. Source: arXiv:2010.02502, eq. 12 and 16. ``share`` draws that share of the next level's
    noise anew instead: the official ``DDIMSampler``, whose default is 0.1.
    """

    def __init__(self, eta: float = 0.0, share: float = 0.0) -> None:
        if not (0 <= eta <= 1 and 0 <= share <= 1) or (eta and share):
            raise ValueError(f"DDIM: eta {eta:g} and share {share:g} are 0 to 1, and one of them is 0")
        self.eta, self.share = eta, share

    def advance(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        x0 = denoise(x, now)
        up = self.share * _number(to.sigma) if self.share else _split(now, to, self.eta)
        draws = bool(self.eta or self.share)
        return _Step(_ancestral(x, x0, now, to, up, path, path.noise_sampler() if draws else None), x0)


class EulerAncestral(_Stepwise):
    """DDIM's stochastic step as k-diffusion words it; ``noise`` scales what is drawn. ``eta`` 1 is DDPM.

    Source: official ``EulerAncestralSampler``; the split of the noise is that of arXiv:2010.02502 eq. 16.
    """

    def __init__(self, eta: float = 1.0, noise: float = 1.0) -> None:
        self.eta, self.noise = eta, noise

    def advance(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        x0 = denoise(x, now)
        up = _split(now, to, self.eta)
        return _Step(_ancestral(x, x0, now, to, up, path, self.noise * path.noise_sampler()), x0)


class DPMSolver2SAncestral(_Stepwise):
    """DPM-Solver++ of order 2, single step, with noise drawn anew: two evaluations a step, one at the last.

    Source: arXiv:2211.01095, algorithm 1; official ``DPMPP2SAncestralSampler``.
    """

    def __init__(self, eta: float = 1.0, noise: float = 1.0) -> None:
        self.eta, self.noise = eta, noise

    def advance(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        x0 = denoise(x, now)
        up = _split(now, to, self.eta)
        down = _lowered(to, up)
        if not down.sigma:
            return _Step(_ancestral(x, x0, now, to, up, path, self.noise * path.noise_sampler()), x0)
        middle = path.level_at_sigma(math.sqrt(_noise(now) * _noise(down)))
        better = denoise(path.step(x, x0, now, middle), middle)
        return _Step(_ancestral(x, better, now, to, up, path, self.noise * path.noise_sampler()), x0)


class _Churned(_Stepwise):
    """Raises the noise before a step: ``churn`` in all over the steps between two noise levels.

    Source: arXiv:2206.00364, algorithm 2; official ``EDMSampler``.
    """

    def __init__(
        self, churn: float = 0.0, lowest: float = 0.0, highest: float = math.inf, noise: float = 1.0
    ) -> None:
        if churn < 0:
            raise ValueError(f"churn is {churn:g}, expected at least 0")
        self.churn, self.lowest, self.highest, self.noise = churn, lowest, highest, noise

    def advance(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        level = _noise(now)
        gamma = (
            min(self.churn / path.steps, math.sqrt(2) - 1) if self.lowest <= level <= self.highest else 0.0
        )
        if gamma > 0:
            # The noise leaves relay's blend as it is.
            raised = path.level_at_sigma(level * (1 + gamma))._replace(relay_blend=now.relay_blend)
            keep = _number(raised.alpha) / _number(now.alpha)
            added = math.sqrt(max(_number(raised.sigma) ** 2 - (keep * _number(now.sigma)) ** 2, 0.0))
            x = keep * x + added * self.noise * path.noise_sampler()
            now = raised
        return self.correct(denoise, x, now, to, path)

    def correct(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        """The step itself."""
        raise NotImplementedError


class Euler(_Churned):
    """First order, deterministic at ``churn`` 0, where it equals DDIM.

    Source: official ``EulerEDMSampler``.
    """

    def correct(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        return _plain(denoise, x, now, to, path)


class Heun(_Churned):
    """Second order: the slopes at both ends of a step, averaged; two evaluations a step, one at the last.

    Source: arXiv:2206.00364, algorithm 1; official ``HeunEDMSampler``.
    """

    def correct(self, denoise: Denoise, x: Tensor, now: Level, to: Level, path: Trajectory) -> _Step:
        x0 = denoise(x, now)
        reached = path.step(x, x0, now, to)
        if not to.sigma:
            return _Step(reached, x0)
        there = denoise(reached, to)
        eps = (path.eps(x, x0, now) + path.eps(reached, there, to)) / 2
        return _Step(path.move(x, (x0 + there) / 2, eps, now, to), x0)


class DPMSolver2M:
    """DPM-Solver++ of order 2 with a memory of one prediction: one evaluation a step, deterministic.

    On a zero-SNR schedule the first step, from pure noise, is of first order, as is the last.
    Source: arXiv:2211.01095, algorithm 2; official ``DPMPP2MSampler``.
    """

    def __call__(
        self, denoise: Denoise, noise: Tensor, path: Trajectory, callback: StepCallback | None = None
    ) -> Tensor:
        x = path.process.start(noise, path.levels[0], path.ctx)
        before: Tensor | None = None
        for i in range(path.steps):
            now, to = path.levels[i], path.levels[i + 1]
            x0 = denoise(x, now)
            ahead = x0
            if before is not None and to.sigma and path.levels[i - 1].alpha:
                last, this = (_log_snr(b) - _log_snr(a) for a, b in ((path.levels[i - 1], now), (now, to)))
                ahead = x0 + (x0 - before) * (this / (2 * last))
            x, before = path.step(x, ahead, now, to), x0
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x


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
        x = path.process.start(noise, path.levels[0], path.ctx)
        seen: list[_Evaluation] = []  # the newest first
        for i in range(path.steps):
            now, to = path.levels[i], path.levels[i + 1]
            x0 = denoise(x, now)
            if now.alpha:
                seen = [_Evaluation(_noise(now), x0, path.eps(x, x0, now)), *seen[: self.order - 1]]
                x = self.advance(x, seen, now, to, path)
            else:
                x = path.step(x, x0, now, to)
            if callback is not None:
                callback(i + 1, path.steps, x0)
        return x

    def advance(self, x: Tensor, seen: list[_Evaluation], now: Level, to: Level, path: Trajectory) -> Tensor:
        """One step in the scale where alpha is 1."""
        weights = _adams(_noise(now), _noise(to), [e.noise for e in seen])
        x0 = torch.stack([w * e.x0 for w, e in zip(weights, seen, strict=True)]).sum(0)
        eps = torch.stack([w * e.eps for w, e in zip(weights, seen, strict=True)]).sum(0)
        ones = [level._replace(alpha=1.0, sigma=_noise(level)) for level in (now, to)]
        return _number(to.alpha) * path.move(x / now.alpha, x0, eps, *ones)


class _Evaluation(NamedTuple):
    """What a multistep sampler remembers of a step."""

    noise: float  # sigma / alpha
    x0: Tensor
    eps: Tensor


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


def _ancestral(
    x: Tensor, x0: Tensor, now: Level, to: Level, up: float, path: Trajectory, drawn: Tensor | None
) -> Tensor:
    """A step to ``to`` of whose noise the part ``up`` is ``drawn`` anew."""
    x = path.step(x, x0, now, _lowered(to, up))
    return x if drawn is None or not up else x + up * drawn


def _lowered(to: Level, up: float) -> Level:
    """``to`` with the noise that is left when ``up`` of it will be drawn anew."""
    return to._replace(sigma=math.sqrt(max(_number(to.sigma) ** 2 - up**2, 0.0)))


def _split(now: Level, to: Level, eta: float) -> float:
    """How much of the noise at ``to`` a step from ``now`` draws anew. Source: arXiv:2010.02502, eq. 16."""
    if not to.sigma or not eta:
        return 0.0
    fraction = _noise(to) / _noise(now) if now.alpha else 0.0
    return min(_number(to.sigma), eta * _number(to.sigma) * math.sqrt(max(1 - fraction**2, 0.0)))


def _noise(level: Level) -> float:
    """sigma / alpha."""
    return _number(level.sigma) / _number(level.alpha)


def _log_snr(level: Level) -> float:
    """log(alpha / sigma)."""
    return -math.log(_noise(level))


def _number(value: float | Tensor) -> float:
    assert not isinstance(value, torch.Tensor), "sampling levels hold floats"
    return value

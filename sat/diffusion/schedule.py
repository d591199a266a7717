"""Noise levels, their spacing over a run, and the schedules that give them."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Scalar = float | Tensor
"""A float in sampling (one level for the batch), a (B, 1, 1, 1) float32 tensor in training."""


class Level(NamedTuple):
    """One noise level, x_t = alpha x0 + sigma eps, and the network's view of it.

    ``net_alpha`` and ``net_sigma`` turn the network's output into x0: officially they are those of the
    nearest of the 1000 training levels, which differ a little from ``alpha`` and ``sigma`` wherever the
    schedule of a short run does (reference: traps 8).
    """

    alpha: Scalar
    sigma: Scalar
    timestep: Scalar  # the network's input, 0 … 999 (flow: 1 … 1000); (B,) while training
    net_alpha: Scalar
    net_sigma: Scalar
    relay_blend: Scalar = 0.0  # relay's r: 0 without relay, 1 at the low-resolution image

    @property
    def scaled_sigma(self) -> float:
        """sigma / alpha of a sampling level: the noise beside a signal of scale 1, EDM's sigma."""
        return float(self.sigma) / float(self.alpha) if self.alpha else math.inf

    @property
    def noise_share(self) -> float:
        """sigma / sqrt(alpha^2 + sigma^2) of a sampling level: 1 is noise alone, 0 a clean picture."""
        return float(self.sigma) / math.hypot(float(self.alpha), float(self.sigma))


CLEAN = Level(1.0, 0.0, 0.0, 1.0, 0.0)
"""The last level of sampling: no noise."""

Spacing = Literal["trailing", "leading", "karras"]
"""``trailing`` and ``leading`` pick training timesteps; ``karras`` noise levels between them."""


def timesteps(steps: int, total: int, spacing: Spacing = "trailing") -> list[int]:
    """``steps`` timesteps of 0 … total - 1, descending.

    ``trailing`` always starts at total - 1: 50 of 1000 are 999, 979, …, 19. ``leading`` always ends at 0:
    980, …, 0. Source: arXiv:2305.08891, table 2; official ``discretizer.py:14``.
    """
    if spacing == "karras":
        raise ValueError("karras spacing gives noise levels, not timesteps: see `karras`")
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total} (the training levels), got {steps}")
    if spacing == "trailing":
        return [int(t) for t in np.linspace(total - 1, 0, steps, endpoint=False).astype(int)]
    return [int(t) for t in (np.arange(steps) * (total // steps))[::-1]]


def karras(steps: int, smallest: float, largest: float, rho: float = 7.0) -> list[float]:
    """``steps`` noise levels from ``largest`` to ``smallest``, evenly spaced in noise^(1 / rho).

    Source: arXiv:2206.00364, eq. 5; official ``discretizer.py`` (``EDMDiscretization``).
    """
    if steps < 1 or not 0 < smallest <= largest or rho <= 0:
        raise ValueError(
            f"expected at least one step, 0 < smallest <= largest and rho > 0; "
            f"got steps {steps}, smallest {smallest}, largest {largest}, rho {rho}"
        )
    first, last = largest ** (1 / rho), smallest ** (1 / rho)
    return [float(s) for s in (first + np.linspace(0, 1, steps) * (last - first)) ** rho]


Table = NDArray[np.float64]
"""A value for each of the ``total`` training timesteps, the cleanest first."""


class Schedule(Protocol):
    """Levels for sampling and for training, from tables in float64."""

    total: int

    def levels(self, steps: int) -> list[Level]:
        """``steps`` + 1 levels from noise to data; the last has sigma 0."""
        ...

    def at(self, timestep: Tensor) -> Level:
        """The training levels of integer timesteps (B,), as (B, 1, 1, 1) float32 tensors."""
        ...

    def level_at_sigma(self, sigma: float) -> Level:
        """The level at noise sigma / alpha = ``sigma``; the network sees the nearest training level."""
        ...

    def sigma_at(self, timestep: float) -> float:
        """sigma / alpha of a training timestep, interpolated between two."""
        ...


def scaled_linear_alphas(total: int = 1000, start: float = 0.00085, end: float = 0.012) -> Table:
    """Cumulative signal level alpha-bar (total,), descending, of betas with linear square roots.

    Source: latent diffusion, arXiv:2112.10752; official ``discretizer.py``.
    """
    # beta_t = (sqrt(start) + t / (total - 1) (sqrt(end) - sqrt(start)))^2, alpha-bar_t = prod (1 - beta)
    betas: Table = np.linspace(start**0.5, end**0.5, total, dtype=np.float64) ** 2
    return np.cumprod(1.0 - betas, dtype=np.float64)


def snr_shift(alphas_cumprod: Table, shift: float) -> Table:
    """alpha-bar after dividing the signal-to-noise ratio a / (1 - a) by ``shift``; 1 changes nothing.

    Source: "simple diffusion", arXiv:2301.11093; official ``discretizer.py:94``.
    """
    return alphas_cumprod / (
        shift + (1 - shift) * alphas_cumprod
    )  # solves a' / (1 - a') = a / (1 - a) / shift


def zero_terminal(root: Table) -> Table:
    """sqrt(alpha-bar), noise last, shifted and scaled so that it ends at exactly 0 and begins where it did.

    Source: arXiv:2305.08891, algorithm 1. A table of one entry cannot be both: it becomes 0.
    """
    first, last = root[0], root[-1]
    if first == last:
        return np.zeros_like(root)
    moved: Table = (root - last) * (first / (first - last))
    return moved


class ZeroSNR:
    """Variance preserving with zero terminal signal: alpha = sqrt(alpha-bar), sigma = sqrt(1 - alpha-bar).

    The schedule of CogView3-Plus (v prediction). ``rescale`` says when the terminal signal is removed:
    ``after_spacing`` (official: the steps of the run are picked first and rescaled by their own end points,
    so alpha at a timestep depends on the number of steps) or ``before_spacing`` (diffusers: the table of all
    ``total`` levels is rescaled once). ``quantise`` (official): x0 is computed with the nearest of the 1000
    training levels.
    """

    def __init__(
        self,
        shift: float = 4.0,  # divides the signal-to-noise ratio; 1 leaves the latent-diffusion schedule
        total: int = 1000,  # training timesteps
        spacing: Spacing = "trailing",  # of the levels that sampling visits
        rescale: Literal["after_spacing", "before_spacing"] = "after_spacing",
        quantise: bool = True,  # x0 with the nearest training level's alpha and sigma
    ) -> None:
        if shift <= 0:
            raise ValueError(f"the schedule's shift must be positive, got {shift}")
        self.total = total
        self.spacing: Spacing = spacing
        self.rescale = rescale
        self.quantise = quantise
        self.root: Table = np.sqrt(snr_shift(scaled_linear_alphas(total), shift))
        self.trained: Table = zero_terminal(self.root)
        self._table = _DeviceTable(self.trained)

    def levels(self, steps: int) -> list[Level]:
        if self.spacing == "karras":  # the terminal level has infinite noise: it comes first, by itself
            last = self._level(float(self.trained[-1]), self.total - 1)
            rest = karras(steps - 1, self.sigma_at(0), self.sigma_at(self.total - 2)) if steps > 1 else []
            return [last, *(self.level_at_sigma(s) for s in rest), CLEAN]
        visited = timesteps(steps, self.total, self.spacing)
        if self.rescale == "after_spacing":
            alphas = zero_terminal(self.root[visited][::-1])[::-1]
        else:
            alphas = self.trained[visited]
        out = [self._level(float(a), i) for a, i in zip(alphas, visited, strict=True)]
        return [*out, CLEAN]

    def level_at_sigma(self, sigma: float) -> Level:
        alpha = (1 + sigma**2) ** -0.5  # sigma' / alpha = sigma with alpha^2 + sigma'^2 = 1
        return self._level(alpha, int(np.abs(self.trained - alpha).argmin()))

    def sigma_at(self, timestep: float) -> float:
        alpha = float(np.interp(timestep, np.arange(self.total), self.trained))
        return float("inf") if alpha == 0 else (1 - alpha**2) ** 0.5 / alpha

    def _level(self, alpha: float, timestep: int) -> Level:
        net = float(self.trained[np.abs(self.trained - alpha).argmin()]) if self.quantise else alpha
        return Level(alpha, (1 - alpha**2) ** 0.5, float(timestep), net, (1 - net**2) ** 0.5)

    def at(self, timestep: Tensor) -> Level:
        alpha = self._table.on(timestep.device)[timestep]
        sigma = (1 - alpha**2).sqrt()
        return _training_level(alpha, sigma, timestep)


class Discrete:
    """Variance exploding over the levels of the latent-diffusion schedule: alpha 1, sigma sqrt((1 - a) / a).

    The schedule of CogView3-Base and CogView3-Relay (eps prediction).
    """

    def __init__(self, total: int = 1000, spacing: Spacing = "trailing") -> None:
        self.total = total
        self.spacing: Spacing = spacing
        cumulative = scaled_linear_alphas(total)
        self.trained: Table = np.sqrt((1 - cumulative) / cumulative)
        self._table = _DeviceTable(self.trained)

    def levels(self, steps: int) -> list[Level]:
        if self.spacing == "karras":
            sigmas = karras(steps, float(self.trained[0]), float(self.trained[-1]))
        else:
            sigmas = [float(self.trained[i]) for i in timesteps(steps, self.total, self.spacing)]
        return [*(self.level_at_sigma(s) for s in sigmas), CLEAN]

    def level_at_sigma(self, sigma: float) -> Level:
        timestep = int(np.abs(self.trained - sigma).argmin())
        return Level(1.0, sigma, float(timestep), 1.0, float(self.trained[timestep]))

    def sigma_at(self, timestep: float) -> float:
        return float(np.interp(timestep, np.arange(self.total), self.trained))

    def at(self, timestep: Tensor) -> Level:
        sigma = self._table.on(timestep.device)[timestep]
        return _training_level(torch.ones_like(sigma), sigma, timestep)


class FlowMatching:
    """Straight paths from image to noise, alpha = 1 - sigma, with a shift that grows with the picture.

    At time s of (0, 1], sigma = mu s / (1 + (mu - 1) s) with mu = ``base_shift`` + ``max_shift``
    sqrt(N / ``base_tokens``), N the picture's patches of ``patch`` x ``patch`` latent cells; a constant mu is
    ``max_shift`` 0. The network is told the *unshifted* time, ``total`` s: 1 … ``total``. ``timestep_of``: a
    network trained on that schedule is told its timestep at the same sigma / alpha instead.

    ``spacing`` of a run: ``linspace`` from ``total`` to 1, cut to whole numbers, as CogView4; ``trailing``
    without the last sliver. By itself it is the schedule of N = ``base_tokens``; :meth:`sized` gives others.
    The defaults are CogView4's. Source: arXiv:2403.03206, section 5.3.2 (shift); diffusers'
    ``FlowMatchEulerDiscreteScheduler`` with linear dynamic shifting, the peer of tests/parity/test_flow.py.
    """

    def __init__(
        self,
        base_shift: float = 0.25,
        max_shift: float = 0.75,
        base_tokens: int = 256,
        patch: int = 2,  # latent cells, each way, of an image token
        total: int = 1000,  # training timesteps
        spacing: Literal["linspace", "trailing"] = "linspace",
        timestep_of: Schedule | None = None,
    ) -> None:
        if min(base_shift, max_shift) < 0 or not base_shift + max_shift > 0:
            raise ValueError(
                f"FlowMatching: base_shift {base_shift:g} and max_shift {max_shift:g}: expected at least 0, "
                "and a sum above 0"
            )
        if min(base_tokens, patch, total) < 1:
            raise ValueError(
                f"FlowMatching: base_tokens {base_tokens}, patch {patch}, total {total}: at least 1"
            )
        self.base_shift, self.max_shift, self.base_tokens = base_shift, max_shift, base_tokens
        self.patch, self.total, self.spacing, self.timestep_of = patch, total, spacing, timestep_of
        self._of_size: dict[int, FlowMatching] = {}
        if timestep_of is not None:  # as angles, which are finite where there is no signal
            self._angles = np.arctan([timestep_of.sigma_at(i) for i in range(timestep_of.total)])
        self._shift_for(base_tokens)

    def sized(self, size: tuple[int, int]) -> FlowMatching:
        """The schedule of a latent of ``size`` (h, w) cells; the same object for the same size."""
        tokens = size[0] * size[1] // self.patch**2
        if tokens not in self._of_size:
            self._of_size[tokens] = other = copy.copy(self)
            other._shift_for(tokens)
        return self._of_size[tokens]

    def _shift_for(self, tokens: int) -> None:
        self.mu = self.base_shift + self.max_shift * (tokens / self.base_tokens) ** 0.5
        self.trained: Table = self._sigma(np.arange(1, self.total + 1) / self.total)
        told = [self._told(t + 1, float(self.trained[t])) for t in range(self.total)]
        self._sigmas, self._times = _DeviceTable(self.trained), _DeviceTable(np.array(told))

    def levels(self, steps: int) -> list[Level]:
        if not 1 <= steps <= self.total:
            raise ValueError(f"steps must be between 1 and {self.total} (the training levels), got {steps}")
        last, inclusive = (1, True) if self.spacing == "linspace" else (0, False)
        times = np.linspace(self.total, last, steps, endpoint=inclusive).astype(int)
        return [*(self._level(float(t), float(self._sigma(t / self.total))) for t in times), CLEAN]

    def level_at_sigma(self, sigma: float) -> Level:
        sigma = sigma / (1 + sigma)  # sigma' / (1 - sigma') = sigma
        return self._level(self.total * sigma / (self.mu - (self.mu - 1) * sigma), sigma)

    def sigma_at(self, timestep: float) -> float:
        sigma = float(np.interp(timestep, np.arange(self.total), self.trained))
        return math.inf if sigma == 1 else sigma / (1 - sigma)

    def at(self, timestep: Tensor) -> Level:
        sigma, told = (table.on(timestep.device)[timestep] for table in (self._sigmas, self._times))
        return _training_level(1 - sigma, sigma, told)

    def _sigma(self, s: Any) -> Any:
        return self.mu * s / (1 + (self.mu - 1) * s)

    def _level(self, time: float, sigma: float) -> Level:
        return Level(1 - sigma, sigma, self._told(time, sigma), 1 - sigma, sigma)

    def _told(self, time: float, sigma: float) -> float:
        """The network's timestep."""
        if self.timestep_of is None:
            return float(time)
        angle = math.atan2(sigma, 1 - sigma)
        return float(np.interp(angle, self._angles, np.arange(len(self._angles))))


def sized(schedule: Schedule, size: tuple[int, int]) -> Schedule:
    """``schedule`` for a latent of ``size`` (h, w) cells: itself where the size does not matter."""
    make = getattr(schedule, "sized", None)
    return schedule if make is None else make(size)


class _DeviceTable:
    """A table that is sent to an accelerator once, not at every loss."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._sent: tuple[torch.device, Tensor] | None = None

    def on(self, device: torch.device) -> Tensor:
        """(total,) float64 on ``device``."""
        if self._sent is not None and self._sent[0] == device:
            return self._sent[1]
        table = torch.from_numpy(self._table).to(device)
        if device.type not in ("cpu", "meta"):
            self._sent = device, table
        return table


def _training_level(alpha: Tensor, sigma: Tensor, timestep: Tensor) -> Level:
    a, s = alpha.float()[:, None, None, None], sigma.float()[:, None, None, None]
    return Level(a, s, timestep.float(), a, s)

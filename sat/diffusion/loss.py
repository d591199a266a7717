"""The training loss of a denoising network, for every process and prediction; its weights by noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.diffusion.draws import Draws
from sat.diffusion.prediction import Denoiser
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Level, Scalar, Schedule
from sat.diffusion.timesteps import Timesteps


class Weighting(Protocol):
    """Weights (B, 1, 1, 1) of the squared error of the network's output, or 1.

    ``gain`` is the factor from that error to the error of x0 (:meth:`Prediction.gain`).
    """

    def __call__(self, level: Level, gain: Scalar) -> Scalar: ...


class Uniform:
    """Weight 1 on the network's own output: the official loss, both for v and for eps.

    The official code states it as a weight on the x0 error, 1 / sigma^2: the same thing.
    """

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return 1.0


class MinSNR:
    """min(SNR, ``gamma``) on the error of x0. Source: arXiv:2303.09556, section 3.4."""

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"MinSNR: gamma is {gamma:g}, expected more than 0")
        self.gamma = gamma

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return _snr(level).clamp(max=self.gamma) * gain


class TruncatedSNR:
    """max(SNR, 1) on the error of x0, for distillation. Source: arXiv:2202.00512, section 4."""

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return _snr(level).clamp(min=1.0) * gain


class SNRPlusOne:
    """SNR + 1 on the error of x0, which is uniform in v. Source: arXiv:2202.00512, section 4."""

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return (_snr(level) + 1) * gain


class AngleWeighting:
    """1 / sin^2 t on the error of x0, t = atan(sigma / alpha): an even error of v, whatever is predicted."""

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        return gain * (level.alpha**2 + level.sigma**2) / level.sigma**2


class LearnedWeighting(nn.Module):
    """exp(w(t)) / sin^2 t on the error of x0, w a learned function of the angle t, 0 at first.

    The loss is exp(w) error - w, least at w = -log of the mean error at t: every level counts alike in it,
    however hard it is. For consistency distillation, which trains it beside the student. w is linear in
    ``features`` cosines cos(k t). Source: sCM, arXiv:2410.11081, eq. 8; EDM2, arXiv:2312.02696, appendix B.
    """

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"LearnedWeighting: features is {features}, expected at least 1")
        self.weights = nn.Parameter(torch.zeros(features))

    def log(self, level: Level) -> Tensor:
        """w(t) (B, 1, 1, 1)."""
        sigma = torch.as_tensor(level.sigma)
        t = torch.atan2(sigma, torch.as_tensor(level.alpha).to(sigma))[..., None].float()
        basis = torch.cos(t * torch.arange(len(self.weights), device=t.device))
        return (basis * self.weights.float()).sum(-1)

    def forward(self, level: Level, gain: Scalar) -> Scalar:
        return torch.exp(self.log(level)) * AngleWeighting()(level, gain)


class FlowWeighting:
    """Weights on the error of eps - x0, whatever the network predicts.

    ``none``: 1. ``sigma_sqrt``: 1 / sigma^2. ``cosmap``: 2 / (pi (1 - 2 sigma + 2 sigma^2)).
    Source: arXiv:2403.03206, section 3.1; the names are those of diffusers' SD3 trainers.
    """

    def __init__(self, kind: Literal["none", "sigma_sqrt", "cosmap"] = "none") -> None:
        self.kind = kind

    def __call__(self, level: Level, gain: Scalar) -> Scalar:
        sigma = level.sigma
        flow = (
            gain * ((level.alpha + sigma) / sigma) ** 2
        )  # error of x0 = sigma / (alpha + sigma) that of flow
        if self.kind == "sigma_sqrt":
            return flow / sigma**2
        if self.kind == "cosmap":
            return flow * 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return flow


def _snr(level: Level) -> Tensor:
    """alpha^2 / sigma^2."""
    return torch.as_tensor(level.alpha) ** 2 / torch.as_tensor(level.sigma) ** 2


class Draw(NamedTuple):
    """The random choices of one training batch."""

    timestep: Tensor  # (B,) int64
    eps: Tensor  # (B, C, h, w) unit noise, plus the offset


class DenoisingLoss:
    """Error between the network's output and its target at random noise levels, per image.

    For v prediction on a zero-SNR schedule this is the official ``ZeroSNRDDPMLoss`` (arXiv:2202.00512 eq. 10
    read as an error in v); for eps prediction the official ``StandardDiffusionLoss``. With relay the target
    is what gives the clean image: the official ``LinearRelayDiffusionLoss``. ``offset_noise`` adds that much
    of one normal draw per image to the noise (drawn after it).

    ``kind``: ``l2``, squares; ``l1``, absolute values of the error of x0 times the weights on it (official
    ``type: l1``); ``huber``, torch's ``huber_loss`` of the output with ``delta`` (None: 1), half the square
    below it. ``timesteps`` are drawn by their chances (None: all alike); ``stratified``: one picture of an
    optimizer step in each of as many equally likely parts as the step has pictures.
    """

    def __init__(
        self,
        weighting: Weighting | None = None,
        offset_noise: float = 0.0,
        kind: Literal["l2", "l1", "huber", "lpips"] = "l2",
        delta: float | None = None,
        timesteps: Timesteps | None = None,
        stratified: bool = False,
    ) -> None:
        if kind == "lpips":
            raise ValueError(
                "kind lpips is for pictures: its VGG takes three channels, and this loss is of latents; the "
                "autoencoder's objective has it (perceptual)"
            )
        if delta is not None and kind != "huber":
            raise ValueError(f"DenoisingLoss: delta {delta:g} is of kind huber, got kind {kind}")
        if delta is not None and not 0 < delta < float("inf"):
            raise ValueError(f"DenoisingLoss: delta is {delta:g}, expected a finite number above 0")
        self.weighting: Weighting = weighting or Uniform()
        self.offset_noise = offset_noise
        self.kind, self.delta = kind, 1.0 if delta is None else delta
        self.timesteps, self.stratified = timesteps, stratified
        self._cumulative: tuple[Schedule | None, int, Tensor] | None = None  # of the last schedule and span

    def draw(self, shape: Sequence[int], span: int, draws: Draws, schedule: Schedule | None = None) -> Draw:
        """Timesteps below ``span`` and unit noise for latents of ``shape`` (C, h, w), from ``draws``.

        ``schedule`` is for chances by noise level: a timestep's share of drawn numbers is its chance.
        """
        if self.timesteps is None and not self.stratified:
            timestep = draws.integers("timestep", span)
        else:
            shares = draws.strata() if self.stratified else draws.uniform("timestep", torch.float64)
            cumulative = self.cumulative(schedule, span).to(shares.device)
            timestep = torch.searchsorted(cumulative, shares, right=True).clamp(max=span - 1)
        eps = draws.normal("eps", shape)
        if self.offset_noise:
            eps = eps + self.offset_noise * draws.normal("offset")[:, None, None, None]
        return Draw(timestep, eps)

    def cumulative(self, schedule: Schedule | None, span: int) -> Tensor:
        """(span,) float64: the chance of each timestep or one below it; kept for the next call."""
        kept = self._cumulative
        if kept is None or kept[0] is not schedule or kept[1] != span:
            if self.timesteps is None:
                summed = torch.arange(1, span + 1, dtype=torch.float64) / span
            elif schedule is None:
                raise ValueError("DenoisingLoss.draw: timesteps by their chances need a schedule")
            else:
                summed = self.timesteps.chances(schedule, span).cumsum(0)
            self._cumulative = kept = schedule, span, summed
        return kept[2]

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        prepared: Any,
        draw: Draw,
        schedule: Schedule,
        process: Process,
        ctx: ProcessContext,
        weight: Tensor | None = None,
    ) -> Tensor:
        """(B,) float32 loss of the clean latents ``x0`` (B, C, h, w) float32.

        ``weight`` (B, 1, h, w) of their places.
        """
        level = process.hooks.at(schedule, draw.timestep)  # fields (B, 1, 1, 1)
        x = process.noise(x0, draw.eps, level, ctx)  # x_t (B, C, h, w)
        out = denoiser.output(x, level, prepared)
        seen = process.noise_seen(x0, draw.eps, level, ctx)  # (x_t - alpha x0) / sigma
        return self.error(out, denoiser.prediction.target(x0, seen, level), level, denoiser, weight)

    def error(
        self, out: Tensor, target: Tensor, level: Level, denoiser: Denoiser, places: Tensor | None = None
    ) -> Tensor:
        """(B,) weighted error of the network's output, by its ``kind``: the mean of w (out - target)^2.

        ``places`` (B, 1, h, w) weigh it once more.
        """
        gain = denoiser.prediction.gain(level)
        weight = self.weighting(level, gain)
        if places is not None:
            weight = weight * places
        if self.kind == "huber":
            each = F.huber_loss(out, target, reduction="none", delta=self.delta)
            return (weight * each).mean((1, 2, 3))
        if self.kind == "l1":  # weight = w gain, |error of x0| = gain^(1/2) |out - target|
            return (weight / gain**0.5 * (out - target).abs()).mean((1, 2, 3))
        return (weight * (out - target) ** 2).mean((1, 2, 3))

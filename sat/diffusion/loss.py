"""The training loss of a denoising network, for every process and parameterisation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.diffusion.denoiser import Denoiser
from sat.diffusion.level import Level
from sat.diffusion.process import Process, ProcessContext
from sat.diffusion.schedule import Schedule
from sat.diffusion.weighting import Uniform, Weighting


class Draw(NamedTuple):
    """The random choices of one training batch."""

    index: Tensor  # type: ignore[assignment] # (B,) int64 timestep; hides tuple.index
    eps: Tensor  # (B, C, h, w) unit noise, plus the offset


class DenoisingLoss:
    """Squared error between the network's output and its target at random noise levels, per image.

    For v prediction on a zero-SNR schedule this is the official ``ZeroSNRDDPMLoss`` (arXiv:2202.00512 eq. 10
    read as an error in v); for eps prediction the official ``StandardDiffusionLoss``. With relay the target
    is what gives the clean image: the official ``LinearRelayDiffusionLoss``. ``offset_noise`` adds that much
    of one normal draw per image to the noise (drawn after it).
    """

    def __init__(self, weighting: Weighting | None = None, offset_noise: float = 0.0) -> None:
        self.weighting: Weighting = weighting or Uniform()
        self.offset_noise = offset_noise

    def draw(self, x0: Tensor, span: int, generator: torch.Generator | None = None) -> Draw:
        """Uniform timesteps below ``span`` and unit noise, from ``generator`` (on its device) or torch's."""
        device = x0.device if generator is None else generator.device
        index = torch.randint(0, span, (x0.shape[0],), generator=generator, device=device)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        if self.offset_noise:
            offset = torch.randn(x0.shape[:1], generator=generator, device=device)
            eps = eps + self.offset_noise * offset[:, None, None, None]
        return Draw(index.to(x0.device), eps.to(x0.device))

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        prepared: Any,
        draw: Draw,
        schedule: Schedule,
        process: Process,
        ctx: ProcessContext,
    ) -> Tensor:
        """(B,) float32 loss of the clean latents ``x0`` (B, C, h, w) float32."""
        level = process.hooks.at(schedule, draw.index)
        x = process.noise(x0, draw.eps, level, ctx)
        out = denoiser.output(x, level, prepared)
        seen = process.noise_seen(x0, draw.eps, level, ctx)
        return self.error(out, denoiser.parameterisation.target(x0, seen, level), level, denoiser)

    def error(self, out: Tensor, target: Tensor, level: Level, denoiser: Denoiser) -> Tensor:
        """(B,) weighted squared error of the network's output."""
        weight = self.weighting(level, denoiser.parameterisation.gain(level))
        return (weight * (out - target) ** 2).mean((1, 2, 3))

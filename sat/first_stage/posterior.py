"""The Gaussian an image is encoded to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


@dataclass(frozen=True)
class Posterior:
    """Independent normal distributions, one per latent value; ``mean`` and ``logvar`` are (B, C, h, w).

    ``logvar`` is clamped to [-30, 20] on construction. Latents are unscaled: multiply by the autoencoder's
    ``scale_factor`` before diffusion. The official code always samples, also when it encodes for relay.
    Source: arXiv:1312.6114; official ``sgm/modules/distributions/distributions.py``.
    """

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.logvar.shape:
            raise ValueError(
                f"posterior mean {tuple(self.mean.shape)} and logvar {tuple(self.logvar.shape)} differ"
            )
        object.__setattr__(self, "logvar", self.logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    @classmethod
    def from_moments(cls, moments: Tensor) -> Posterior:
        """Posterior of an encoder output (B, 2C, h, w): the means, then the log variances."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar)

    @property
    def moments(self) -> Tensor:
        """(B, 2C, h, w): the means, then the clamped log variances."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def std(self) -> Tensor:
        """Standard deviation (B, C, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent (B, C, h, w): the mean."""
        return self.mean

    def sample(self, noise: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """A latent (B, C, h, w) drawn with ``noise`` (standard normal, same shape) or with ``generator``.

        Neither given: torch's global generator. A generator of another device draws there, so a CPU generator
        gives the same latent on every device.
        """
        if noise is not None and generator is not None:
            raise ValueError("give noise or a generator, not both")
        if noise is None:
            noise = normal_like(self.mean, generator)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, the latent {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """Divergence to the standard normal (B,), in nats, summed over C, h, w; at least float32."""
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3))


def normal_like(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise of the shape, type and device of ``like``, drawn on the generator's device."""
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device).to(like)

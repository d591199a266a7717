"""Training of the first stage: reconstruct the image through a sampled latent."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.data.batch import Batch
from sat.diffusion.draws import Draws, GeneratorDraws
from sat.embeddings import sent
from sat.first_stage.model import AutoencoderKL, Posterior
from sat.train.objectives.base import Objective


class HasFirstStage(Protocol):
    """The part of an engine that this objective uses."""

    first_stage: AutoencoderKL


class FirstStageObjective(Objective):
    """L1 + ``edge`` x image gradients at two scales + ``kl`` x KL, each a mean over its values.

    ``pixel``, ``edge``: weights of the absolute error of the pixels (in [-1, 1]) and of their horizontal and
    vertical differences, at full and at half size. ``kl``: of the divergence per latent value, in nats.
    Logged beside ``loss``: ``pixel``, ``edge``, ``kl``, ``psnr`` (dB, of the clamped sampled reconstruction),
    ``latent_mean`` and ``latent_std`` (of all latent values; 1 / latent_std is a fitting ``scale_factor``).

    ``freeze_encoder``: train the decoder alone. Latents stay what they are, so a diffusion model of them
    stays valid while its pictures get sharper. ``noise``: deviation of further noise on the latents that are
    decoded in training, in their units, so that the decoder forgives a diffusion model's errors.

    Training reconstructs from a sampled latent, validation from its mode. The convolutions run channels-last,
    which on a CPU in bf16 is several times faster.
    """

    def __init__(
        self,
        pixel: float = 1.0,
        edge: float = 1.0,
        kl: float = 1e-4,
        noise: float = 0.0,
        freeze_encoder: bool = False,
        *,
        engine: HasFirstStage,
    ) -> None:
        super().__init__()
        if min(pixel, edge, kl, noise) < 0 or pixel + edge <= 0:
            raise ValueError(
                f"train.objective: pixel {pixel}, edge {edge}, kl {kl}, noise {noise} must not be negative, "
                f"and pixel or edge must be positive"
            )
        self.first_stage = engine.first_stage
        self.pixel, self.edge, self.kl, self.noise = pixel, edge, kl, noise
        if freeze_encoder:
            self.first_stage.encoder.requires_grad_(False)
            self.first_stage.quant.requires_grad_(False)

    def parts(self) -> dict[str, nn.Module]:
        """The part that a checkpoint of this training holds."""
        return {"first_stage": self.first_stage}

    def draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Noise of the posterior, and further noise on its latents."""
        image, first_stage = self._images(batch), self.first_stage
        shape = (first_stage.channels, *(side // first_stage.factor for side in image.shape[2:]))
        made = {"posterior": draws.normal("posterior", shape)}
        return made | ({"noise": draws.normal("noise", shape)} if self.noise else {})

    def held_out_draws(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """None: held-out images go through the mode."""
        return {}

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """``loss`` and the logged terms, float32 scalars; the latent is drawn by ``batch.draws``."""
        image = self._images(batch)
        drawn = batch.draws or self.draws(batch, GeneratorDraws(len(batch), generator))
        posterior = self.first_stage.encode(image)
        latent = posterior.sample(sent(drawn["posterior"], image.device))
        if self.noise:
            latent = latent + self.noise * sent(drawn["noise"], image.device).to(latent.dtype)
        return self._terms(image, posterior, latent)

    def evaluate(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The same of held-out images, through the mode of the latent; ``generator`` is not drawn from."""
        image = self._images(batch)
        posterior = self.first_stage.encode(image)
        return self._terms(image, posterior, posterior.mode())

    def _images(self, batch: Batch) -> Tensor:
        """The batch's images (B, 3, H, W), channels-last in memory."""
        if batch.image is None:
            raise ValueError(
                "train.objective: the first stage trains on images, but the batch has only latents "
                "(set data.cache_views to 0)"
            )
        return batch.image.contiguous(memory_format=torch.channels_last)

    def _terms(self, image: Tensor, posterior: Posterior, latent: Tensor) -> dict[str, Tensor]:
        """The loss and its parts for images (B, 3, H, W) reconstructed from ``latent`` (B, C, h, w)."""
        made, target = self.first_stage.decode(latent).float(), image.float()  # (B, 3, H, W)
        pixel = (made - target).abs().mean()
        edge = edge_error(made, target)
        kl = posterior.kl().mean() / latent[0].numel()  # nats per latent value
        with torch.no_grad():
            latent_std, latent_mean = torch.std_mean(latent.float())
            psnr = peak_signal_to_noise(made, target).mean()
        return {
            "loss": self.pixel * pixel + self.edge * edge + self.kl * kl,
            "pixel": pixel.detach(),
            "edge": edge.detach(),
            "kl": kl.detach(),
            "psnr": psnr,
            "latent_mean": latent_mean,
            "latent_std": latent_std,
        }


def edge_error(made: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error () of neighbouring-pixel differences, both ways, at full and half size, averaged.

    Images are (B, C, H, W), H and W at least 4. Differences are linear: the error is differenced.
    """
    error = made - target
    half = F.avg_pool2d(error, 2)
    terms = [scale.diff(dim=dim).abs().mean() for scale in (error, half) for dim in (2, 3)]
    return torch.stack(terms).mean()


def peak_signal_to_noise(made: Tensor, target: Tensor) -> Tensor:
    """PSNR (B,) in dB of images (B, C, H, W) in [-1, 1]; ``made`` is clamped first. At most 100 dB."""
    mse = (made.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3)) / 4
    return -10 * torch.log10(mse.clamp_min(1e-10))

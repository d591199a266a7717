"""First stage: the autoencoder between images and latents."""

from sat.first_stage.model import AutoencoderKL, Posterior

__all__ = ["AutoencoderKL", "Posterior"]

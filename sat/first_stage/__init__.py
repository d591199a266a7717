"""First stage: the autoencoder between images and latents."""

from sat.first_stage.autoencoder import AutoencoderKL
from sat.first_stage.posterior import Posterior

__all__ = ["AutoencoderKL", "Posterior"]

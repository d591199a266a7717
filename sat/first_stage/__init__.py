"""First stage: the autoencoder between images and latents."""

from sat.first_stage.model import AutoencoderKL
from sat.first_stage.posterior import Posterior

__all__ = ["AutoencoderKL", "Posterior"]

"""CogView3-Base and CogView3-Relay: a UNet with transformers in its lower resolutions."""

from sat.models.cogview3_unet.model import CogView3UNet, Prepared
from sat.models.cogview3_unet.sharding import PLAN

__all__ = ["PLAN", "CogView3UNet", "Prepared"]

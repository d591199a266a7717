"""CogView3-Base and CogView3-Relay: a UNet with transformers in its lower resolutions."""

from sat.models.cogview3_unet.plan import PLAN
from sat.models.cogview3_unet.unet import CogView3UNet, Prepared

__all__ = ["PLAN", "CogView3UNet", "Prepared"]

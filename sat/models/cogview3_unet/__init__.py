"""CogView3-Base and CogView3-Relay: a UNet with transformers in its lower resolutions."""

from sat.models.cogview3_unet.keys import SHARDING
from sat.models.cogview3_unet.model import CogView3UNet, Prepared

__all__ = ["SHARDING", "CogView3UNet", "Prepared"]

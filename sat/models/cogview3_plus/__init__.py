"""CogView3-Plus: a diffusion transformer over text and image tokens."""

from sat.models.cogview3_plus.keys import SHARDING
from sat.models.cogview3_plus.model import CogView3Plus
from sat.models.dit import Prepared

__all__ = ["SHARDING", "CogView3Plus", "Prepared"]

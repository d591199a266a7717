"""CogView3-Plus: a diffusion transformer over text and image tokens."""

from sat.models.cogview3_plus.model import CogView3Plus, Prepared
from sat.models.cogview3_plus.sharding import PLAN

__all__ = ["PLAN", "CogView3Plus", "Prepared"]

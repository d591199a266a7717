"""CogView4: the network, its checkpoint names and its sharding."""

from sat.models.cogview4.keys import SHARDING
from sat.models.cogview4.model import CogView4

__all__ = ["SHARDING", "CogView4"]

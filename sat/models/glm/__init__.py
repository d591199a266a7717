"""The GLM-4 text encoder: network, checkpoint names and sharding."""

from sat.models.glm.model import GLMEncoder, from_huggingface

__all__ = ["GLMEncoder", "from_huggingface"]

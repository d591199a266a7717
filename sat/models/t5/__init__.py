"""The T5 text encoder: network, checkpoint names and sharding."""

from sat.models.t5.model import T5Encoder, from_huggingface

__all__ = ["T5Encoder", "from_huggingface"]

"""The T5 text encoder: network, tokenizer, checkpoint names and sharding plan."""

from sat.models.t5.model import T5Encoder, from_huggingface
from sat.tokenizers import T5Tokenizer, Tokens

__all__ = ["T5Encoder", "T5Tokenizer", "Tokens", "from_huggingface"]

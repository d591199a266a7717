"""The GLM-4 language model as a text encoder, on the transformer base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from sat.mixins.text_encoder import CausalText, TokenEmbed
from sat.transformer import BlockSpec, Context, Transformer

EPS = 1.5625e-07


class GLMEncoder(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, dim) in front of the language model's last layer.

    The defaults are those of GLM-4-9B, of whose 40 layers 39 are needed: neither the last one nor the final
    norm is loaded (``hidden_states[-2]`` of transformers). Causal pre-norm blocks with RMS norm, gated SiLU,
    biases on q, k and v alone; ``kv_heads`` heads of keys and values serve all ``heads``; ``rotary`` is the
    share of a head's channels that turns with the position. Peer: ``GlmModel`` of transformers.
    """

    tokenizer: ClassVar[str] = "sat.tokenizers.GLMTokenizer"
    """The class that makes its ids."""

    def __init__(
        self,
        dim: int = 4096,
        heads: int = 32,
        kv_heads: int = 2,
        head_dim: int = 128,
        mlp_dim: int = 13696,
        depth: int = 39,
        vocab: int = 151552,
        rotary: float = 0.5,
    ) -> None:
        super().__init__()
        self.dim, self.vocab = dim, vocab
        spec = BlockSpec(
            norm="rms", eps=EPS, bias=False, qkv_bias=True, head_dim=head_dim, kv_heads=kv_heads,
            mlp_dim=mlp_dim, mlp="swiglu",
        )  # fmt: skip
        mixins = {"token_embed": TokenEmbed(vocab, dim), "causal_text": CausalText(int(head_dim * rotary))}
        self.transformer = Transformer(dim, heads, depth, mixins, spec)
        self._initialise()

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states (B, T, dim) of ``ids`` (B, T); padding takes part, as in CogView4."""
        out: Tensor = self.transformer(Context(ids=ids))
        return out  # (B, T, dim)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of deviation 0.02, no biases: GLM's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


_FIXED: Mapping[str, object] = {
    "model_type": "glm",
    "hidden_act": "silu",
    "attention_bias": True,
    "rms_norm_eps": EPS,
}
_NAMES = {
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "vocab": "vocab_size",
}


def from_huggingface(config: Mapping[str, object]) -> dict[str, int | float]:
    """Parameters of :class:`GLMEncoder` for the content of a Hugging Face ``config.json``: one layer less."""
    rope = config.get("rope_parameters") or config  # transformers 5 has a section for it
    assert isinstance(rope, Mapping), "a section"
    said = {**config, "rope_theta": rope.get("rope_theta", 10000.0)}
    for key, want in {**_FIXED, "rope_theta": 10000.0}.items():
        if said.get(key) != want:
            raise ValueError(
                f"text encoder config.json: {key} is {said.get(key)!r}, only {want!r} is supported"
            )
    out: dict[str, int | float] = {}
    for ours, theirs in _NAMES.items():
        value = config.get(theirs)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 + (ours == "depth"):
            raise ValueError(
                f"text encoder config.json: {theirs} is {value!r}, expected a positive whole number"
            )
        out[ours] = value - (ours == "depth")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"text encoder config.json: partial_rotary_factor is {share!r}, expected 0 to 1")
    return {**out, "rotary": float(share)}


def to_huggingface(params: Mapping[str, object], dtype: str) -> dict[str, object]:
    """config.json of transformers' ``GlmModel`` for our parameters, with the last layer that ours lacks."""
    defaults = {"dim": 4096, "heads": 32, "kv_heads": 2, "head_dim": 128, "mlp_dim": 13696, "depth": 39}
    sizes = {**defaults, "vocab": 151552, **params}
    depth = sizes["depth"]
    assert isinstance(depth, int), "checked with the config"
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": params.get("rotary", 0.5)
    }  # fmt: skip
    return {
        "architectures": ["GlmModel"],
        **_FIXED,
        **{theirs: sizes[ours] for ours, theirs in _NAMES.items()},
        "num_hidden_layers": depth + 1,
        "attention_dropout": 0.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "use_cache": True,
        "pad_token_id": None,
        "rope_parameters": rope,
        "rope_theta": 10000.0,  # for transformers 4
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "torch_dtype": dtype,
    }

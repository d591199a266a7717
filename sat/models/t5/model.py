"""The T5 encoder (version 1.1) on the transformer base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sat.mixins.text_encoder import FinalNorm, RelativeBias, TokenEmbed
from sat.transformer import BlockSpec, Context, Transformer
from sat.transformer.transformer import Block

EPS = 1e-6


class T5Encoder(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, dim) after the last norm. The defaults are T5-XXL's.

    Pre-norm blocks with RMS norm, gated GELU, no biases and unscaled attention logits; one table of relative
    position biases serves all layers. ``vocab`` may exceed the tokenizer's (32,128 rows for 32,100 tokens).
    Source: arXiv:1910.10683 and the v1.1 release notes; peer ``T5EncoderModel`` of transformers.
    """

    def __init__(
        self,
        dim: int = 4096,
        heads: int = 64,
        head_dim: int = 64,
        mlp_dim: int = 10240,
        depth: int = 24,
        vocab: int = 32128,
        buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        super().__init__()
        self.dim, self.vocab = dim, vocab
        spec = BlockSpec(
            norm="rms",
            eps=EPS,
            affine=True,
            bias=False,
            head_dim=head_dim,
            mlp_dim=mlp_dim,
            mlp="geglu",
            scale=1.0,
        )
        mixins = {
            "token_embed": TokenEmbed(vocab, dim),
            "relative_bias": RelativeBias(heads, buckets, max_distance),
            "final_norm": FinalNorm(dim, EPS),
        }
        self.transformer = Transformer(dim, heads, depth, mixins, spec)
        self._initialise(dim, heads, head_dim, mlp_dim)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, dim) of ``ids`` (B, T). ``mask`` (B, T): true = may be attended.

        CogView3 gives no mask: padding takes part.
        """
        key_mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, T)
        out: Tensor = self.transformer(Context(ids=ids, key_mask=key_mask))
        return out  # (B, T, dim)

    @torch.no_grad()
    def _initialise(self, dim: int, heads: int, head_dim: int, mlp_dim: int) -> None:
        """T5's own initialisation: as logits are not scaled, query weights are smaller by sqrt(head_dim)."""
        for module in self.transformer.mixins.values():
            if isinstance(module, TokenEmbed):
                nn.init.normal_(module.table.weight, 0.0, 1.0)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.table.weight, 0.0, dim**-0.5)
        for block in self.transformer.blocks:
            assert isinstance(block, Block), "a transformer is made of blocks"
            nn.init.normal_(block.attn.qkv.weight, 0.0, dim**-0.5)
            block.attn.qkv.weight[: heads * head_dim].mul_(head_dim**-0.5)
            nn.init.normal_(block.attn.proj.weight, 0.0, (heads * head_dim) ** -0.5)
            for linear in (block.mlp.gate, block.mlp.up, block.mlp.down):
                assert linear is not None, "T5 v1.1 blocks are gated"
                nn.init.normal_(linear.weight, 0.0, (mlp_dim if linear is block.mlp.down else dim) ** -0.5)


def from_huggingface(config: Mapping[str, object]) -> dict[str, int]:
    """Parameters of :class:`T5Encoder` for the content of a Hugging Face ``config.json``.

    Only version 1.1 encoders (gated GELU) are meant; anything else is refused.
    """
    fixed: dict[str, tuple[object, object]] = {  # key -> (what it must be, what its absence means)
        "model_type": ("t5", "t5"),
        "feed_forward_proj": ("gated-gelu", "relu"),
        "layer_norm_epsilon": (EPS, EPS),
    }
    for key, (want, absent) in fixed.items():
        if config.get(key, absent) != want:
            raise ValueError(
                f"text encoder config.json: {key} is {config.get(key, absent)!r}, only {want!r} is supported"
            )
    names = {
        "dim": "d_model",
        "heads": "num_heads",
        "head_dim": "d_kv",
        "mlp_dim": "d_ff",
        "depth": "num_layers",
        "vocab": "vocab_size",
        "buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
    }
    defaults = {"buckets": 32, "max_distance": 128}
    out: dict[str, int] = {}
    for ours, theirs in names.items():
        value = config.get(theirs, defaults.get(ours))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"text encoder config.json: {theirs} is {value!r}, expected a positive whole number"
            )
        out[ours] = value
    return out

"""Names of a Hugging Face T5 encoder's tensors and ours.

The same names stand in an official engine file, behind ``conditioner.embedders.0.transformer.``, and in the
``text_encoder`` of a diffusers folder.
"""

from __future__ import annotations

from sat.keys import Drop, Fuse, Rename, Rules, Tie
from sat.sharding import Column, Row, Sharding

_BLOCK = "encoder.block.{}.layer"

HF: Rules = (
    Tie(("shared.weight", "encoder.embed_tokens.weight"), "transformer.mixins.token_embed.table.weight"),
    Rename(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "transformer.mixins.relative_bias.table.weight",
    ),
    Rename(f"{_BLOCK}.0.layer_norm.weight", "transformer.blocks.{}.norm1.weight"),
    Fuse(
        tuple(f"{_BLOCK}.0.SelfAttention.{name}.weight" for name in "qkv"),
        "transformer.blocks.{}.attn.qkv.weight",
    ),
    Rename(f"{_BLOCK}.0.SelfAttention.o.weight", "transformer.blocks.{}.attn.proj.weight"),
    Rename(f"{_BLOCK}.1.layer_norm.weight", "transformer.blocks.{}.norm2.weight"),
    Rename(f"{_BLOCK}.1.DenseReluDense.wi_0.weight", "transformer.blocks.{}.mlp.gate.weight"),
    Rename(f"{_BLOCK}.1.DenseReluDense.wi_1.weight", "transformer.blocks.{}.mlp.up.weight"),
    Rename(f"{_BLOCK}.1.DenseReluDense.wo.weight", "transformer.blocks.{}.mlp.down.weight"),
    Rename("encoder.final_layer_norm.weight", "transformer.mixins.final_norm.norm.weight"),
    Drop("decoder.**", "whole T5 checkpoints carry the decoder, which is not used"),
    Drop("lm_head.**", "whole T5 checkpoints carry the decoder's output layer, which is not used"),
)
SAT: Rules = HF
DIFFUSERS: Rules = HF


# -- how a T5 encoder may be split over tensor-parallel ranks


SHARDING: Sharding = {
    "transformer.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "transformer.blocks.*.attn.proj": Row(unit="head_dim"),
    "transformer.blocks.*.mlp.gate": Column(),
    "transformer.blocks.*.mlp.up": Column(),
    "transformer.blocks.*.mlp.down": Row(),
    # An embedding (buckets, heads): a rank holds the columns of its heads.
    "transformer.mixins.relative_bias.table": Column(),
}
"""Heads and hidden units are shared out; the token table (263 MB in bfloat16 for XXL) stays whole."""

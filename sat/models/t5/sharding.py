"""How a T5 encoder may be split over tensor-parallel ranks."""

from __future__ import annotations

from sat.sharding import Column, Plan, Row

PLAN: Plan = {
    "transformer.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "transformer.blocks.*.attn.proj": Row(unit="head_dim"),
    "transformer.blocks.*.mlp.gate": Column(),
    "transformer.blocks.*.mlp.up": Column(),
    "transformer.blocks.*.mlp.down": Row(),
    # An embedding (buckets, heads): a rank holds the columns of its heads.
    "transformer.mixins.relative_bias.table": Column(),
}
"""Heads and hidden units are shared out; the token table (263 MB in bfloat16 for XXL) stays whole."""

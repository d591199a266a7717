"""Names of the UNet's tensors in official SAT files: 1680, 1681 with the guidance embedding.

Ours follow the official order: ``down.{i}``, ``middle`` and ``up.{i}`` are lists of layers, as are the
official ``input_blocks``, ``middle_block`` and ``output_blocks``. Source: official ``openaimodel.py`` and
``attention.py``.
"""

from __future__ import annotations

from sat.keys import Fuse, Rename, Rule, Rules, Split
from sat.sharding import Column, Row, Sharding


def _layers(theirs: str, ours: str) -> list[Rule]:
    """One place of a list of layers: a residual block, a transformer, or a change of resolution."""
    block, mine = f"{theirs}.transformer_blocks.{{}}", f"{ours}.blocks.{{}}"
    cross = f"{ours}.mixins.cross.layers.{{}}"
    tokens = f"{ours}.mixins.map"
    return [
        Rename(f"{theirs}.in_layers.0.*", f"{ours}.norm1.*"),
        Rename(f"{theirs}.in_layers.2.*", f"{ours}.conv1.*"),
        Rename(f"{theirs}.emb_layers.1.*", f"{ours}.emb.*"),
        Rename(f"{theirs}.out_layers.0.*", f"{ours}.norm2.*"),
        Rename(f"{theirs}.out_layers.3.*", f"{ours}.conv2.*"),
        Rename(f"{theirs}.skip_connection.*", f"{ours}.shortcut.*"),
        Rename(f"{theirs}.op.*", f"{ours}.shrink.*"),
        Rename(f"{theirs}.conv.*", f"{ours}.grow.*"),
        Rename(f"{theirs}.norm.*", f"{tokens}.norm.*"),
        Rename(f"{theirs}.proj_in.*", f"{tokens}.enter.*"),
        Rename(f"{theirs}.proj_out.*", f"{tokens}.leave.*"),
        Rename(f"{block}.norm1.*", f"{mine}.norm1.*"),
        Fuse([f"{block}.attn1.to_{name}.*" for name in "qkv"], f"{mine}.attn.qkv.*"),
        Rename(f"{block}.attn1.to_out.0.*", f"{mine}.attn.proj.*"),
        Rename(f"{block}.norm2.*", f"{cross}.norm.*"),
        Rename(f"{block}.attn2.to_q.*", f"{cross}.q.*"),
        Fuse([f"{block}.attn2.to_{name}.*" for name in "kv"], f"{cross}.kv.*"),
        Rename(f"{block}.attn2.to_out.0.*", f"{cross}.proj.*"),
        Rename(f"{block}.norm3.*", f"{mine}.norm2.*"),
        Split(f"{block}.ff.net.0.proj.*", [f"{mine}.mlp.up.*", f"{mine}.mlp.gate.*"]),  # value, then gate
        Rename(f"{block}.ff.net.2.*", f"{mine}.mlp.down.*"),
    ]


#: ``mp_rank_00_model_states.pt``, names after ``model.diffusion_model.``.
SAT: Rules = [
    Rename("time_embed.{}.*", "time.{}.*"),
    Rename("label_emb.0.{}.*", "size.{}.*"),
    Rename("w_proj.*", "guidance.*"),
    Rename("input_blocks.0.0.*", "stem.*"),
    *_layers("input_blocks.{}.{}", "down.{}.{}"),
    *_layers("middle_block.{}", "middle.{}"),
    *_layers("output_blocks.{}.{}", "up.{}.{}"),
    Rename("out.0.*", "head.0.*"),
    Rename("out.2.*", "head.2.*"),
]


# -- how the UNet may be split over tensor ranks: its transformers are; its convolutions stay whole


SHARDING: Sharding = {
    "*.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "*.blocks.*.attn.proj": Row(unit="head_dim"),
    "*.mixins.cross.layers.*.q": Column(unit="head_dim"),
    "*.mixins.cross.layers.*.kv": Column(parts=2, unit="head_dim"),
    "*.mixins.cross.layers.*.proj": Row(unit="head_dim"),
    "*.blocks.*.mlp.gate": Column(),
    "*.blocks.*.mlp.up": Column(),
    "*.blocks.*.mlp.down": Row(),
}

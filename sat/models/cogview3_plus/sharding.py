"""How CogView3-Plus may be split over tensor ranks."""

from sat.sharding import Column, Plan, Row

PLAN: Plan = {
    "transformer.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "transformer.blocks.*.attn.proj": Row(unit="head_dim"),
    "transformer.blocks.*.mlp.up": Column(),
    "transformer.blocks.*.mlp.down": Row(),
    "transformer.mixins.adaln.layers.*.1": Column(gather=True),
}

"""How the UNet may be split over tensor ranks: its transformers are; its convolutions stay whole."""

from sat.sharding import Column, Plan, Row

PLAN: Plan = {
    "*.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "*.blocks.*.attn.proj": Row(unit="head_dim"),
    "*.mixins.cross.layers.*.q": Column(unit="head_dim"),
    "*.mixins.cross.layers.*.kv": Column(parts=2, unit="head_dim"),
    "*.mixins.cross.layers.*.proj": Row(unit="head_dim"),
    "*.blocks.*.mlp.gate": Column(),
    "*.blocks.*.mlp.up": Column(),
    "*.blocks.*.mlp.down": Row(),
}

"""How the UNet may be split over tensor ranks: its transformers are; its convolutions stay whole."""

from sat.plan import Column, Plan, Row

PLAN: Plan = {
    "*.blocks.*.attn.qkv": Column(parts=3),
    "*.blocks.*.attn.proj": Row(),
    "*.mixins.cross.layers.*.q": Column(),
    "*.mixins.cross.layers.*.kv": Column(parts=2),
    "*.mixins.cross.layers.*.proj": Row(),
    "*.blocks.*.mlp.gate": Column(),
    "*.blocks.*.mlp.up": Column(),
    "*.blocks.*.mlp.down": Row(),
}

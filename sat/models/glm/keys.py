"""Names of a Hugging Face GLM's tensors and ours, alone (``GlmModel``) and in a whole language model.

``Beyond``: the language model's last layer, which an encoder of one layer less has no place for.
"""

from __future__ import annotations

from sat.keys import Beyond, Drop, Fuse, Rename, Rule, Rules, Split
from sat.sharding import Column, Row, Sharding

_OURS = "transformer.blocks.{}."


def _names(root: str) -> list[Rule]:
    layer = root + "layers.{}."
    return [
        Rename(root + "embed_tokens.weight", "transformer.mixins.token_embed.table.weight"),
        Rename(layer + "input_layernorm.weight", _OURS + "norm1.weight"),
        Rename(layer + "self_attn.q_proj.*", _OURS + "attn.q.*"),
        Fuse([layer + f"self_attn.{n}_proj.*" for n in "kv"], _OURS + "attn.kv.*"),
        Rename(layer + "self_attn.o_proj.weight", _OURS + "attn.proj.weight"),
        Rename(layer + "post_attention_layernorm.weight", _OURS + "norm2.weight"),
        Split(layer + "mlp.gate_up_proj.weight", [_OURS + "mlp.gate.weight", _OURS + "mlp.up.weight"]),
        Rename(layer + "mlp.down_proj.weight", _OURS + "mlp.down.weight"),
        Drop(root + "norm.weight", "hidden states are taken in front of the last layer and the final norm"),
        Beyond(_OURS + "**", "hidden states are taken in front of the last layer"),
    ]


HF: Rules = _names("")
HF_LM: Rules = [*_names("model."), Drop("lm_head.**", "the language model's output layer is not used")]
SAT: Rules = HF
DIFFUSERS: Rules = HF


# -- how a GLM encoder may be split over tensor-parallel ranks


SHARDING: Sharding = {
    "transformer.blocks.*.attn.q": Column(unit="head_dim"),
    "transformer.blocks.*.attn.kv": Column(parts=2, unit="head_dim"),
    "transformer.blocks.*.attn.proj": Row(unit="head_dim"),
    "transformer.blocks.*.mlp.gate": Column(),
    "transformer.blocks.*.mlp.up": Column(),
    "transformer.blocks.*.mlp.down": Row(),
}
"""Heads and hidden units; as many ranks as heads of keys (2 of GLM-4). The token table stays whole."""

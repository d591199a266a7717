"""Names of CogView3-Plus tensors in checkpoints: the official SAT file and diffusers' transformer folder.

Counts for the 3 B model: SAT 317 names, diffusers 436 (q, k and v apart, no position table).
Sources: official ``sat/dit.py``; diffusers ``scripts/convert_cogview3_to_diffusers.py``.
"""

from __future__ import annotations

from sat.keys import Computed, Fuse, Rename, Rules, SwapHalves
from sat.sharding import Column, Row, Sharding

_OURS = "transformer.blocks.{}."
_MIXINS = "transformer.mixins."
_TABLE = _MIXINS + "position.table"

_SAT = "transformer.layers.{}."

#: ``mp_rank_00_model_states.pt``, names after ``model.diffusion_model.``. The position table is usually in
#: the file; where it is not, the computed one stays (official: a frozen parameter).
SAT: Rules = [
    Rename("mixins.pos_embed.image_pos_embedding", _TABLE, optional=True),
    Rename("mixins.patch_embed.proj.*", _MIXINS + "patch_embed.proj.*"),
    Rename("mixins.patch_embed.text_proj.*", _MIXINS + "patch_embed.text.*"),
    Rename("time_embed.{}.*", "time.{}.*"),
    Rename("label_emb.0.{}.*", "size.{}.*"),
    Rename("w_proj.*", "guidance.*"),  # of distilled models, as the UNets name it
    # image then text, each (shift, scale, gate) of attention and of the MLP: the same order in all three
    Rename("mixins.adaln.adaln_modules.{}.1.*", _MIXINS + "adaln.layers.{}.1.*"),
    Rename(_SAT + "attention.query_key_value.*", _OURS + "attn.qkv.*"),
    Rename(_SAT + "attention.dense.*", _OURS + "attn.proj.*"),
    Rename(_SAT + "mlp.dense_h_to_4h.*", _OURS + "mlp.up.*"),
    Rename(_SAT + "mlp.dense_4h_to_h.*", _OURS + "mlp.down.*"),
    Rename("mixins.final_layer.adaln.1.*", _MIXINS + "final_layer.adaln.1.*"),
    Rename("mixins.final_layer.linear.*", _MIXINS + "final_layer.linear.*"),
]

_THEIRS = "transformer_blocks.{}."

#: ``CogView3PlusTransformer2DModel``. Its final modulation is (scale, shift); ours and the official is
#: (shift, scale).
DIFFUSERS: Rules = [
    Computed(_TABLE, "diffusers keeps the table in a buffer that is not saved"),
    Rename("patch_embed.proj.*", _MIXINS + "patch_embed.proj.*"),
    Rename("patch_embed.text_proj.*", _MIXINS + "patch_embed.text.*"),
    Rename("time_condition_embed.timestep_embedder.linear_1.*", "time.0.*"),
    Rename("time_condition_embed.timestep_embedder.linear_2.*", "time.2.*"),
    Rename("time_condition_embed.condition_embedder.linear_1.*", "size.0.*"),
    Rename("time_condition_embed.condition_embedder.linear_2.*", "size.2.*"),
    Rename(_THEIRS + "norm1.linear.*", _MIXINS + "adaln.layers.{}.1.*"),
    Fuse([_THEIRS + f"attn1.to_{n}.*" for n in "qkv"], _OURS + "attn.qkv.*"),
    Rename(_THEIRS + "attn1.to_out.0.*", _OURS + "attn.proj.*"),
    Rename(_THEIRS + "ff.net.0.proj.*", _OURS + "mlp.up.*"),
    Rename(_THEIRS + "ff.net.2.*", _OURS + "mlp.down.*"),
    SwapHalves("norm_out.linear.*", _MIXINS + "final_layer.adaln.1.*"),
    Rename("proj_out.*", _MIXINS + "final_layer.linear.*"),
]


# -- how CogView3-Plus may be split over tensor ranks


SHARDING: Sharding = {
    "transformer.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "transformer.blocks.*.attn.proj": Row(unit="head_dim"),
    "transformer.blocks.*.mlp.up": Column(),
    "transformer.blocks.*.mlp.down": Row(),
    "transformer.mixins.adaln.layers.*.1": Column(gather=True),
}

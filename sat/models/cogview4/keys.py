"""Names of CogView4 tensors in checkpoints: diffusers' transformer folder, SAT and Megatron files.

Counts for the 6 B model: diffusers 408 names, SAT and Megatron 296 (q, k and v in one). Sources: diffusers
``transformer_cogview4.py`` and ``scripts/convert_cogview4_to_diffusers*.py``. adaLN has one order in all
three: image and text side by side for each of shift, scale and gate.
"""

from __future__ import annotations

from sat.keys import Flatten, Fuse, HeadsFirst, Rename, Rules, SwapHalves
from sat.sharding import Column, Row, Sharding

_OURS = "transformer.blocks.{}."
_MIXINS = "transformer.mixins."
_ADALN, _HEAD = _MIXINS + "adaln.layers.{}.1.*", _MIXINS + "final_layer."
_THEIRS, _SAT, _MEGATRON = "transformer_blocks.{}.", "transformer.layers.{}.", "decoder.layers.{}."
_TIME = "time_condition_embed."

#: ``CogView4Transformer2DModel``. Its final modulation is (scale, shift); ours is (shift, scale).
DIFFUSERS: Rules = [
    Rename("patch_embed.proj.*", _MIXINS + "patch_embed.proj.*"),
    Rename("patch_embed.text_proj.*", _MIXINS + "patch_embed.text.*"),
    Rename(_TIME + "timestep_embedder.linear_1.*", "time.0.*"),
    Rename(_TIME + "timestep_embedder.linear_2.*", "time.2.*"),
    Rename(_TIME + "condition_embedder.linear_1.*", "size.0.*"),
    Rename(_TIME + "condition_embedder.linear_2.*", "size.2.*"),
    Rename(_THEIRS + "norm1.linear.*", _ADALN),
    Fuse([_THEIRS + f"attn1.to_{n}.*" for n in "qkv"], _OURS + "attn.qkv.*"),
    Rename(_THEIRS + "attn1.to_out.0.*", _OURS + "attn.proj.*"),
    Rename(_THEIRS + "ff.net.0.proj.*", _OURS + "mlp.up.*"),
    Rename(_THEIRS + "ff.net.2.*", _OURS + "mlp.down.*"),
    SwapHalves("norm_out.linear.*", _HEAD + "adaln.1.*"),
    Rename("proj_out.*", _HEAD + "linear.*"),
]

#: ``mp_rank_00_model_states.pt``, names after ``model.diffusion_model.``.
SAT: Rules = [
    Rename("mixins.patch_embed.proj.*", _MIXINS + "patch_embed.proj.*"),
    Rename("mixins.patch_embed.text_proj.*", _MIXINS + "patch_embed.text.*"),
    Rename("time_embed.{}.*", "time.{}.*"),
    Rename("label_emb.0.{}.*", "size.{}.*"),
    Rename("w_proj.*", "guidance.*"),  # of distilled models, as the UNets name it
    Rename("mixins.adaln.adaln_modules.{}.1.*", _ADALN),
    Rename(_SAT + "attention.query_key_value.*", _OURS + "attn.qkv.*"),
    Rename(_SAT + "attention.dense.*", _OURS + "attn.proj.*"),
    Rename(_SAT + "mlp.dense_h_to_4h.*", _OURS + "mlp.up.*"),
    Rename(_SAT + "mlp.dense_4h_to_h.*", _OURS + "mlp.down.*"),
    Rename("mixins.final_layer.adaln.1.*", _HEAD + "adaln.1.*"),
    Rename("mixins.final_layer.linear.*", _HEAD + "linear.*"),
]

#: ``model_optim_rng.pt``, below ``model``: q, k and v of one head (of the published 128) after another.
MEGATRON: Rules = [
    Flatten("encoder_expand_linear.weight", _MIXINS + "patch_embed.proj.weight"),
    Rename("encoder_expand_linear.bias", _MIXINS + "patch_embed.proj.bias"),
    Rename("text_projector.*", _MIXINS + "patch_embed.text.*"),
    Rename("time_embedding.time_embed.{}.*", "time.{}.*"),
    Rename("label_embedding.label_embed.{}.*", "size.{}.*"),
    Rename(_MEGATRON + "adaln.*", _ADALN),
    HeadsFirst(_MEGATRON + "self_attention.linear_qkv.*", _OURS + "attn.qkv.*", head_dim=128),
    Rename(_MEGATRON + "self_attention.linear_proj.*", _OURS + "attn.proj.*"),
    Rename(_MEGATRON + "mlp.linear_fc1.*", _OURS + "mlp.up.*"),
    Rename(_MEGATRON + "mlp.linear_fc2.*", _OURS + "mlp.down.*"),
    Rename("adaln_final.*", _HEAD + "adaln.1.*"),
    Rename("output_projector.*", _HEAD + "linear.*"),
]


# -- how CogView4 may be split over tensor ranks


SHARDING: Sharding = {
    "transformer.blocks.*.attn.qkv": Column(parts=3, unit="head_dim"),
    "transformer.blocks.*.attn.proj": Row(unit="head_dim"),
    "transformer.blocks.*.mlp.up": Column(),
    "transformer.blocks.*.mlp.down": Row(),
    "transformer.mixins.adaln.layers.*.1": Column(gather=True),
}

"""Tensor names of the autoencoder in other formats.

SAT: ``imagekl_ch16.pt`` and ``sdxl_vae.safetensors``; engine files put ``first_stage_model.`` in front.
DIFFUSERS: ``vae/`` folders (``AutoencoderKL``). The 16-channel and the 4-channel
autoencoder share the lists.
"""

from __future__ import annotations

from sat.keys import ConvToLinear, Rename, Rule, Rules

_BLOCK = ("norm1", "conv1", "norm2", "conv2")


def _block(theirs: str, ours: str, shortcut: str) -> list[Rule]:
    """Rules of the residual blocks named ``theirs`` and ``ours``; ``shortcut`` is their 1x1 skip."""
    same: list[Rule] = [Rename(f"{theirs}.{name}.*", f"{ours}.{name}.*") for name in _BLOCK]
    return [*same, Rename(f"{theirs}.{shortcut}.*", f"{ours}.shortcut.*")]


def _sat(half: str) -> list[Rule]:
    """Official names of the encoder or the decoder, except its levels."""
    attention = f"{half}.mid.attn_1"
    return [
        Rename(f"{half}.conv_in.*", f"{half}.stem.*"),
        *_block(f"{half}.mid.block_1", f"{half}.middle.block1", "nin_shortcut"),
        *_block(f"{half}.mid.block_2", f"{half}.middle.block2", "nin_shortcut"),
        Rename(f"{attention}.norm.*", f"{half}.middle.attention.norm.*"),
        *(ConvToLinear(f"{attention}.{name}.*", f"{half}.middle.attention.{name}.*") for name in "qkv"),
        ConvToLinear(f"{attention}.proj_out.*", f"{half}.middle.attention.proj.*"),
        Rename(f"{half}.norm_out.*", f"{half}.norm.*"),
        Rename(f"{half}.conv_out.*", f"{half}.head.*"),
    ]


def _diffusers(half: str) -> list[Rule]:
    """Names in diffusers of the encoder or the decoder, except its levels."""
    attention = f"{half}.mid_block.attentions.0"
    return [
        Rename(f"{half}.conv_in.*", f"{half}.stem.*"),
        *_block(f"{half}.mid_block.resnets.0", f"{half}.middle.block1", "conv_shortcut"),
        *_block(f"{half}.mid_block.resnets.1", f"{half}.middle.block2", "conv_shortcut"),
        Rename(f"{attention}.group_norm.*", f"{half}.middle.attention.norm.*"),
        *(Rename(f"{attention}.to_{name}.*", f"{half}.middle.attention.{name}.*") for name in "qkv"),
        Rename(f"{attention}.to_out.0.*", f"{half}.middle.attention.proj.*"),
        Rename(f"{half}.conv_norm_out.*", f"{half}.norm.*"),
        Rename(f"{half}.conv_out.*", f"{half}.head.*"),
    ]


_QUANT: list[Rule] = [Rename("quant_conv.*", "quant.*"), Rename("post_quant_conv.*", "post_quant.*")]

#: Official names. Decoder levels count from the finest there and from the coarsest (execution order) here.
SAT: Rules = [
    *_sat("encoder"),
    *_block("encoder.down.{}.block.{}", "encoder.levels.{}.blocks.{}", "nin_shortcut"),
    Rename("encoder.down.{}.downsample.conv.*", "encoder.levels.{}.down.conv.*"),
    *_sat("decoder"),
    *_block("decoder.up.{~}.block.{}", "decoder.levels.{}.blocks.{}", "nin_shortcut"),
    Rename("decoder.up.{~}.upsample.conv.*", "decoder.levels.{}.up.conv.*"),
    *_QUANT,
]

#: diffusers' names.
DIFFUSERS: Rules = [
    *_diffusers("encoder"),
    *_block("encoder.down_blocks.{}.resnets.{}", "encoder.levels.{}.blocks.{}", "conv_shortcut"),
    Rename("encoder.down_blocks.{}.downsamplers.0.conv.*", "encoder.levels.{}.down.conv.*"),
    *_diffusers("decoder"),
    *_block("decoder.up_blocks.{}.resnets.{}", "decoder.levels.{}.blocks.{}", "conv_shortcut"),
    Rename("decoder.up_blocks.{}.upsamplers.0.conv.*", "decoder.levels.{}.up.conv.*"),
    *_QUANT,
]

"""Controls in other programs: names of a UNet's ControlNet in diffusers, and folders that diffusers opens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from sat.checkpoint.files import atomic_folder, open_file
from sat.checkpoint.format import TensorInfo, write_safetensors
from sat.checkpoint.rules import as_theirs
from sat.checkpoint.save import write_json
from sat.checkpoint.verify import Verify
from sat.config.build import build_empty, without_init
from sat.config.check import build, resolve, signature
from sat.config.schema import plain
from sat.control.base import BaseModel, ControlError
from sat.control.controlnet import UNetControlNet
from sat.control.files import locate, read_info
from sat.keys import Fuse, Rename, Rule, Rules, Split
from sat.models.cogview3_unet.model import Downsample

# -- names of ``ControlNetModel``


def unet_rules(control: UNetControlNet) -> Rules:
    """Rules from the names of diffusers' ``ControlNetModel`` of the same sizes to those of ``control``.

    diffusers counts residual blocks and transformers apart within each resolution; ours are in one list of
    places, ``down.0`` of which is the stem.
    """
    rules: list[Rule] = [
        *(Rename(f"time_embedding.linear_{n + 1}.*", f"side.time.{2 * n}.*") for n in range(2)),
        *(Rename(f"class_embedding.linear_{n + 1}.*", f"side.size.{2 * n}.*") for n in range(2)),
        Rename("time_embedding.cond_proj.*", "side.guidance.*"),
        Rename("conv_in.*", "side.stem.*"),
        Rename("controlnet_cond_embedding.conv_in.*", "side.mixins.picture.widen.*"),
        Rename("controlnet_cond_embedding.blocks.{}.*", "side.mixins.picture.blocks.{}.*"),
        Rename("controlnet_cond_embedding.conv_out.*", "side.mixins.picture.leave.*"),
        Rename("controlnet_down_blocks.{}.*", "zeros.{}.*"),
        Rename("controlnet_mid_block.*", "middle.*"),
    ]
    level = number = 0
    for place, layers in enumerate(control.side.down):
        theirs, ours = f"down_blocks.{level}", f"side.down.{place}"
        first, *rest = layers.children() if place else (None,)
        if isinstance(first, Downsample):
            rules.append(Rename(f"{theirs}.downsamplers.0.conv.*", f"{ours}.0.shrink.*"))
            level, number = level + 1, 0
        elif first is not None:
            rules += _resnet(f"{theirs}.resnets.{number}", f"{ours}.0")
            rules += _transformer(f"{theirs}.attentions.{number}", f"{ours}.1") if rest else []
            number += 1
    for n in range(2):
        rules += _resnet(f"mid_block.resnets.{n}", f"side.middle.{2 * n}")
    return [*rules, *_transformer("mid_block.attentions.0", "side.middle.1")]


def _resnet(theirs: str, ours: str) -> list[Rule]:
    same = ("norm1", "conv1", "norm2", "conv2")
    return [
        *(Rename(f"{theirs}.{name}.*", f"{ours}.{name}.*") for name in same),
        Rename(f"{theirs}.time_emb_proj.*", f"{ours}.emb.*"),
        Rename(f"{theirs}.conv_shortcut.*", f"{ours}.shortcut.*"),
    ]


def _transformer(theirs: str, ours: str) -> list[Rule]:
    block, mine = f"{theirs}.transformer_blocks.{{}}", f"{ours}.blocks.{{}}"
    cross = f"{ours}.mixins.cross.layers.{{}}"
    return [
        Rename(f"{theirs}.norm.*", f"{ours}.mixins.map.norm.*"),
        Rename(f"{theirs}.proj_in.*", f"{ours}.mixins.map.enter.*"),
        Rename(f"{theirs}.proj_out.*", f"{ours}.mixins.map.leave.*"),
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


def write_controlnet(
    source: Path, folder: Path, imports: Collection[str] = (), dtype: torch.dtype | None = None
) -> int:
    """Write the UNet's ControlNet at ``source`` as a folder that ``ControlNetModel.from_pretrained`` opens.

    Returns the number of tensors. ``dtype`` None keeps the file's.
    """
    info = read_info(source)
    base = BaseModel(build_empty(info.base, imports), info.base, imports)
    with torch.device("meta"), without_init():
        control = build(info.control, imports=imports, base=base)
    if not isinstance(control, UNetControlNet):
        kind = info.base.target.rpartition(".")[2]
        raise ControlError(
            f"{source}: diffusers has no class for a {type(control).__name__} of {kind}, only for the "
            f"ControlNet of a UNet"
        )
    if control.side.guidance is not None:
        raise ControlError(f"{source}: is of a distilled UNet, whose guidance strength ControlNetModel lacks")
    config = _config(plain({**signature(resolve(info.base.target, imports)).defaults, **info.base.params}))
    config["conditioning_embedding_out_channels"] = control.hint
    with open_file(locate(source), verify=Verify()) as opened, atomic_folder(folder) as place:
        theirs = as_theirs(opened, unet_rules(control))
        read = {name: theirs[name] if dtype is None else theirs[name].to(dtype) for name in theirs}
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in read.items()}
        file = place / "diffusion_pytorch_model.safetensors"
        write_safetensors(file, infos, read.__getitem__, {"format": "pt"})
        write_json(place / "config.json", config)
        opened.verified()
    return len(infos)


def _config(params: dict[str, Any]) -> dict[str, Any]:
    """diffusers' settings of a ``ControlNetModel`` for the parameters of our UNet."""
    widths = [params["width"] * multiplier for multiplier in params["multipliers"]]
    attends = [2**level in params["attention"] for level in range(len(widths))]
    return {
        "_class_name": "ControlNetModel",
        "in_channels": params["channels"],
        "block_out_channels": widths,
        "layers_per_block": params["blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends],
        "transformer_layers_per_block": params["depths"],
        "attention_head_dim": [width // params["head_dim"] for width in widths],  # numbers of heads, in fact
        "cross_attention_dim": params["text_dim"],
        "norm_num_groups": params["groups"],
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": params["size_dim"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }

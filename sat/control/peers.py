"""Controls in other programs: names in diffusers, and folders that diffusers opens.

diffusers has a class for the ControlNet of a UNet. For controls of CogView3-Plus the folder brings its own
code (``hub/``), a pipeline and the control as a component, beside the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.checkpoint.convert import Build, Sources, convert
from sat.checkpoint.eight_bits import Whole
from sat.checkpoint.files import atomic_folder, open_file
from sat.checkpoint.format import TensorInfo, write_safetensors
from sat.checkpoint.formats.diffusers import DiffusersPipeline
from sat.checkpoint.load import refuse_not_finite
from sat.checkpoint.rules import as_theirs
from sat.checkpoint.save import Options, write_json
from sat.checkpoint.verify import Verify
from sat.config.build import build_empty, without_init
from sat.config.check import build, resolve, signature
from sat.config.schema import Component, plain
from sat.control.base import BaseModel, Control, ControlError
from sat.control.controlnet import TransformerControlNet, UNetControlNet
from sat.control.files import FILE, ControlInfo, check_fits, locate, narrowed, opened, read_info, write
from sat.control.light import Blockwise, TransformerConcat
from sat.keys import Fuse, Rename, Rule, Rules, Split
from sat.models.cogview3_plus.keys import DIFFUSERS
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
    control = without_weights(info, imports)
    if not isinstance(control, UNetControlNet):
        kind = info.base.target.rpartition(".")[2]
        raise ControlError(
            f"{source}: diffusers has no class for a {type(control).__name__} of {kind}, only for the "
            f"ControlNet of a UNet"
        )
    if control.takes != "pixels" or not control.hint:
        how = "its latent" if control.takes == "latent" else "its pixels cell by cell (an empty `hint`)"
        raise ControlError(
            f"{source}: takes of its picture {how}, ControlNetModel its pixels by convolutions"
        )
    if control.side.guidance is not None:
        raise ControlError(f"{source}: is of a distilled UNet, whose guidance strength ControlNetModel lacks")
    config = _config(plain({**signature(resolve(info.base.target, imports)).defaults, **info.base.params}))
    config["conditioning_embedding_out_channels"] = control.hint
    with opened(locate(source), Verify()) as ours, atomic_folder(folder) as place:
        theirs = as_theirs(ours, unet_rules(control))
        read = narrowed({name: theirs[name] for name in theirs}, dtype, str(source))
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in read.items()}
        file = place / "diffusion_pytorch_model.safetensors"
        write_safetensors(file, infos, read.__getitem__, {"format": "pt"})
        write_json(place / "config.json", config)
        ours.verified()
    return len(infos)


def without_weights(info: ControlInfo, imports: Collection[str] = ()) -> Control:
    """The control that ``info`` describes, without values."""
    base = BaseModel(build_empty(info.base, imports), info.base, imports)
    with torch.device("meta"), without_init():
        made: Control = build(info.control, imports=imports, base=base)
    return made


def write_native(
    source: Path, folder: Path, imports: Collection[str] = (), dtype: torch.dtype | None = None
) -> int:
    """Write the control at ``source`` as ``folder/control.safetensors`` in ``dtype``; the control's tensors.

    None keeps the file's types; int8 is 8 bits a weight. Buffers, such as tables, stay as they are.
    """
    info = read_info(source)
    exact = {name for name, _ in without_weights(info, imports).named_buffers()}
    stored = open_file(locate(source), verify=Verify())
    with Whole(stored) if dtype else stored as ours, atomic_folder(folder) as place:
        tensors = {name: ours[name] for name in ours}
        ours.verified()
        for name, tensor in tensors.items():
            refuse_not_finite(tensor, name, str(source))
        write(place / FILE, tensors, info, dtype, exact)
    return len(tensors)


# -- CogView4-Control: the network with a control of further channels


def concatenated(path: Path) -> Tensor:
    """The weight (D, C p p) of a control of further channels at ``path``, for CogView4-Control."""
    info = read_info(path)
    kind, base = info.control.target.rpartition(".")[2], info.base.target.rpartition(".")[2]
    if (
        base != "CogView4"
        or kind not in ("concat", "TransformerConcat")
        or info.control.params.get("inpaint")
        or info.control.params.get("input") == "pixels"
    ):
        raise ControlError(
            f"{path}: is {kind} of {base}; CogView4-Control of diffusers has `concat` of one picture's latent"
        )
    with opened(locate(path), Verify()) as tensors:
        weight = tensors["zeros.weight"].clone()
        tensors.verified()
    return weight


def write_published(path: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """The control of diffusers' CogView4-Control at ``path`` as a file of ours in ``folder``."""
    write(folder / FILE, {"zeros.weight": concatenated(path)}, read_info(path), dtype)


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


# -- a folder of CogView3-Plus with a control, which brings its own code

HUB = Path(__file__).with_name("hub")
"""Code of the folder: ``pipeline.py`` at its root, ``control.py`` beside the control's weights."""


def write_pipeline(
    source: Path,
    model: Sources,
    folder: Path,
    build: Build,
    imports: Collection[str] = (),
    options: Options | None = None,
) -> int:
    """Write ``model`` with the control at ``source`` on it as a folder for diffusers; the control's tensors.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` opens it where only diffusers is.
    """
    info, options = read_info(source), options or Options()
    control = without_weights(info, imports)
    kind = {TransformerControlNet: "controlnet", Blockwise: "blockwise", TransformerConcat: "concat"}.get(
        type(control)
    )
    if (
        kind is None
        or control.takes not in ("latent", "pixels")
        or not info.base.target.endswith(".CogView3Plus")
    ):
        raise ControlError(
            f"{source}: is a {type(control).__name__} that takes {control.takes}, of "
            f"{info.base.target.rpartition('.')[2]}: a folder for diffusers is for ControlNet, block-wise "
            f"control and concat of CogView3Plus, by a picture's latent or pixels"
        )
    with atomic_folder(folder) as place:
        convert(model, place, "diffusers", build, options=options)
        base = dict(DiffusersPipeline().config(place)["model"])
        single = info.base.params.get("double_norm", True)  # which diffusers has no word for
        base["params"] = {**base["params"], "double_norm": single}
        check_fits(info, Component(**base), source, imports)
        (place / "controlnet").mkdir()
        with opened(locate(source), Verify()) as ours:
            theirs = as_theirs(ours, _plus_rules(control))
            read = {name: theirs[name] for name in theirs}
            ours.verified()
        if isinstance(control, TransformerControlNet) and control.shares:
            with DiffusersPipeline().open(place, "model") as whole:
                names = [f"transformer_blocks.{i}.norm1.linear" for i in range(len(control.zeros))]
                read |= {f"{n}.{leaf}": whole[f"{n}.{leaf}"] for n in names for leaf in ("weight", "bias")}
        read = narrowed(read, options.dtype, str(source))
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in read.items()}
        file = place / "controlnet" / "diffusion_pytorch_model.safetensors"
        write_safetensors(file, infos, read.__getitem__, {"format": "pt"})
        transformer = json.loads((place / "transformer" / "config.json").read_text())
        taken = ("patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "text_embed_dim",
                 "time_embed_dim", "pos_embed_max_size")  # fmt: skip
        depth = transformer["num_layers"]
        cell = info.control.params.get("cell", 8) if control.takes == "pixels" else 0
        sizes = {"kind": kind, "base_layers": depth, "layers": depth, "hidden": 0, "cell": cell}
        if isinstance(control, TransformerControlNet):
            sizes["layers"] = len(control.zeros)
        if isinstance(control, Blockwise):
            sizes["hidden"] = control.up[0].out_features
        own = {"_class_name": "CogView3PlusControl", **sizes, **{name: transformer[name] for name in taken}}
        write_json(place / "controlnet" / "config.json", own)
        index = json.loads((place / "model_index.json").read_text())
        index["_class_name"] = ["pipeline", "CogView3PlusControlPipeline"]
        write_json(place / "model_index.json", {**index, "controlnet": ["control", "CogView3PlusControl"]})
        shutil.copyfile(HUB / "pipeline.py", place / "pipeline.py")
        shutil.copyfile(HUB / "control.py", place / "controlnet" / "control.py")
    return len(infos)


def _plus_rules(control: Control) -> Rules:
    """Rules from the names of ``hub/control.py`` to those of ``control``."""
    if not isinstance(control, TransformerControlNet):
        return [Rename(name, name) for name in control.state_dict()]
    own: Rules = [
        Rename("picture.*", "transformer.mixins.picture.proj.*"),
        Rename("zeros.{}.*", "zeros.{}.*"),
    ]
    return [*own, *(rule for rule in DIFFUSERS if not _elsewhere(rule))]


def _elsewhere(rule: Rule) -> bool:
    """True for names of parts that a control has no copy of: the time embedding and the head."""
    ours = getattr(rule, "ours", "")
    return isinstance(ours, str) and ours.startswith(("time.", "size.", "transformer.mixins.final_layer."))

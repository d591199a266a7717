"""ControlNet on the UNet against diffusers' ``ControlNetModel`` and ``UNet2DConditionModel``, in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from sat.checkpoint.format import as_lazy
from sat.checkpoint.load import load
from sat.checkpoint.rules import as_ours
from sat.cli.convert import main as convert
from sat.config.check import build
from sat.config.schema import Component
from sat.control.base import BaseModel, attach
from sat.control.controlnet import UNetControlNet, controlnet
from sat.control.files import ControlInfo, write
from sat.control.peers import unet_rules
from sat.control_input import ControlInput
from sat.models.cogview3_unet import CogView3UNet
from tests.parity.test_cogview3_unet import BLOCKS, T, X, condition, official
from tests.small import fill
from tests.tolerances import F64

SIZES = {
    "in_channels": 4, "block_out_channels": (16, 32, 48), "layers_per_block": BLOCKS,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 3), "attention_head_dim": (2, 4, 6), "cross_attention_dim": 24,
    "norm_num_groups": 8, "use_linear_projection": True, "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 40, "flip_sin_to_cos": True, "freq_shift": 0,
}  # fmt: skip
PARAMS = {
    "channels": 4, "width": 16, "multipliers": [1, 2, 3], "blocks": BLOCKS, "attention": [2, 4],
    "depths": [1, 2, 3], "head_dim": 8, "text_dim": 24, "text_len": 7, "size_dim": 40, "groups": 8,
}  # fmt: skip
HINT = (4, 6, 10)
PICTURE = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def pair() -> tuple[UNet2DConditionModel, ControlNetModel, CogView3UNet]:
    """diffusers' networks, and ours with the control attached under ``edges``; the same random weights."""
    up = {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "out_channels": 4}
    peer = UNet2DConditionModel(**SIZES, **up, sample_size=16).double().eval()
    side = ControlNetModel(**SIZES, conditioning_embedding_out_channels=HINT).double().eval()
    fill(peer)
    fill(side, seed=7)
    ours = CogView3UNet(**PARAMS).double().eval()
    load(ours, {official(name): tensor for name, tensor in peer.state_dict().items()}, "model")
    component = Component("sat.models.cogview3_unet.CogView3UNet", PARAMS)
    control = controlnet(hint=HINT, base=BaseModel(ours, component))
    assert isinstance(control, UNetControlNet)
    load(control, as_ours(as_lazy(side.state_dict()), unet_rules(control)), "model")
    attach(ours, "edges", control)
    return peer, side, ours


@torch.no_grad()
def theirs(peer: UNet2DConditionModel, side: ControlNetModel, scale: float, *, guess: bool) -> Tensor:
    cond = condition()
    given = {"encoder_hidden_states": cond.text, "class_labels": cond.vector, "return_dict": False}
    down, middle = side(X, T, controlnet_cond=PICTURE, conditioning_scale=scale, guess_mode=guess, **given)
    out: Tensor = peer(
        X, T, down_block_additional_residuals=down, mid_block_additional_residual=middle, **given
    )[0]
    return out


@torch.no_grad()
def mine(ours: CogView3UNet, scale: float, *, guess: bool) -> Tensor:
    cond = replace(condition(), controls=(ControlInput("edges", PICTURE, (scale, scale), guess=guess),))
    return ours(X, T.float(), ours.prepare(cond, (12, 20)))


@pytest.mark.parametrize(("scale", "guess"), [(1.0, False), (0.6, False), (1.0, True)])
def test_the_unets_control_equals_diffusers(scale: float, guess: bool) -> None:
    peer, side, ours = pair()
    want = theirs(peer, side, scale, guess=guess)
    assert want.std() > 0.5
    assert (want - mine(ours, scale, guess=guess)).abs().max() < F64
    assert (want - mine(ours, 0.0, guess=guess)).abs().max() > 0.01, "the control does something"


def test_diffusers_opens_what_convert_writes(tmp_path: Path) -> None:
    """The folder's ControlNetModel gives the residuals of ours, with the weights of the file."""
    peer, side, ours = pair()
    control = ours.mixins["edges"]
    assert isinstance(control, UNetControlNet)
    design = Component("sat.control.controlnet.controlnet", {"hint": list(HINT)})
    info = ControlInfo(design, Component("sat.models.cogview3_unet.CogView3UNet", PARAMS))
    write(tmp_path / "edges.safetensors", control.state_dict(), info)
    assert convert([str(tmp_path / "edges.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    opened = ControlNetModel.from_pretrained(tmp_path / "out", torch_dtype=torch.float64)
    assert (theirs(peer, opened, 1.0, guess=False) - theirs(peer, side, 1.0, guess=False)).abs().max() == 0
    assert (theirs(peer, opened, 1.0, guess=False) - mine(ours, 1.0, guess=False)).abs().max() < F64


@pytest.mark.parametrize(
    ("design", "message"),
    [
        (
            Component("sat.control.controlnet.controlnet", {"input": "latent"}),
            "takes of its picture its latent",
        ),
        (Component("sat.control.controlnet.controlnet", {"hint": []}), "its pixels cell by cell"),
        (Component("sat.control.light.blockwise"), "no class for a UNetBlockwise of CogView3UNet"),
    ],
    ids=["latent", "cells", "block-wise"],
)
def test_what_diffusers_has_no_class_for_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], design: Component, message: str
) -> None:
    unet = Component("sat.models.cogview3_unet.CogView3UNet", PARAMS)
    made = build(design, base=BaseModel(CogView3UNet(**PARAMS), unet))
    write(tmp_path / "edges.safetensors", made.state_dict(), ControlInfo(design, unet))
    assert convert([str(tmp_path / "edges.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

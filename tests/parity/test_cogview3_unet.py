"""The UNet of CogView3-Base and Relay against diffusers', weights moved through the real key rules."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import Tensor

from sat.checkpoint.load import load
from sat.conditioning.conditioner import Condition
from sat.diffusion.guidance import ClassifierFree
from sat.models.cogview3_unet import CogView3UNet
from tests.small import fill
from tests.tolerances import F64

BLOCKS = 2
LEVELS = 3
T = torch.tensor([999, 17])
X = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
STRENGTH = torch.tensor([7.5, 2.0])

_INSIDE_A_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "w_proj",
    "class_embedding.linear_1": "label_emb.0.0", "class_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def official(name: str) -> str:
    """The official name of a tensor of diffusers' UNet."""
    stem, kind = name.rsplit(".", 1)
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    if found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", stem):
        return f"input_blocks.{(int(found[1]) + 1) * (BLOCKS + 1)}.0.op.{kind}"
    if found := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", stem):
        level = int(found[1])
        place = 2 if level < LEVELS - 1 else 1  # behind a transformer, where the level has one
        return f"output_blocks.{level * (BLOCKS + 1) + BLOCKS}.{place}.conv.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", stem):
        where = f"middle_block.{1 if found[1] == 'attentions' else 2 * int(found[2])}"
        rest = found[3]
    else:
        found = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", stem)
        assert found, name
        side = "input_blocks" if found[1] == "down" else "output_blocks"
        place = int(found[2]) * (BLOCKS + 1) + int(found[4]) + (found[1] == "down")
        where, rest = f"{side}.{place}.{int(found[3] == 'attentions')}", found[5]
    return f"{where}.{_INSIDE_A_RESNET.get(rest, rest)}.{kind}"


def small(guidance_dim: int | None = None) -> tuple[UNet2DConditionModel, CogView3UNet]:
    """The same random network twice: widths 16, 32 and 48, heads of 8, transformers of 2 and 3 layers."""
    peer = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(16, 32, 48), layers_per_block=BLOCKS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), attention_head_dim=(2, 4, 6),  # numbers of heads, in fact
        cross_attention_dim=24, norm_num_groups=8, use_linear_projection=True, sample_size=16,
        class_embed_type="projection", projection_class_embeddings_input_dim=40,
        flip_sin_to_cos=True, freq_shift=0, time_cond_proj_dim=guidance_dim,
    ).double().eval()  # fmt: skip
    fill(peer)
    ours = CogView3UNet(
        channels=4, width=16, multipliers=(1, 2, 3), blocks=BLOCKS, attention=(2, 4), depths=(1, 2, 3),
        head_dim=8, text_dim=24, text_len=7, size_dim=40, groups=8, guidance_dim=guidance_dim,
    ).double().eval()  # fmt: skip
    load(ours, {official(name): tensor for name, tensor in peer.state_dict().items()}, "model")
    return peer, ours


def condition(batch: int = 2, *, masked: bool = False) -> Condition:
    g = torch.Generator().manual_seed(2)
    text = torch.randn(batch, 7, 24, generator=g, dtype=torch.float64)
    vector = torch.randn(batch, 40, generator=g, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.arange(4, 4 + batch)[:, None] if masked else None
    return Condition(text, vector, mask)


@torch.no_grad()
def theirs(peer: UNet2DConditionModel, cond: Condition, x: Tensor = X, t: Tensor = T) -> Tensor:
    features = None
    if cond.guidance is not None:
        features = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, cond.guidance, 12)
        features = features.double()
    out: Tensor = peer(
        x, t, cond.text, class_labels=cond.vector, timestep_cond=features,
        encoder_attention_mask=cond.text_mask, return_dict=False,
    )[0]  # fmt: skip
    return out


@torch.no_grad()
def mine(ours: CogView3UNet, cond: Condition, x: Tensor = X, t: Tensor = T) -> Tensor:
    return ours(x, t.float(), ours.prepare(cond, (x.shape[2], x.shape[3])))


@pytest.mark.parametrize("masked", [False, True])
def test_equals_diffusers(masked: bool) -> None:
    peer, ours = small()
    cond = condition(masked=masked)
    want = theirs(peer, cond)
    assert want.std() > 0.5
    assert (want - mine(ours, cond)).abs().max() < F64


def test_a_mask_hides_text_from_both_networks() -> None:
    peer, ours = small()
    for run in (lambda c: theirs(peer, c), lambda c: mine(ours, c)):
        assert (run(condition()) - run(condition(masked=True))).abs().max() > 0.01


def test_a_guided_batch_equals_diffusers() -> None:
    """Unconditional rows first, one timestep for all, steps prepared ahead as in sampling."""
    peer, ours = small()
    cond = condition()
    both = ClassifierFree(5.0).rows(cond, cond.null())
    doubled = torch.cat([X, X])
    with torch.no_grad():
        got = ours(doubled, 499.0, ours.prepare(both, (12, 20), [999.0, 499.0]))
    assert (theirs(peer, both, doubled, torch.tensor([499])) - got).abs().max() < F64


def test_the_guidance_strength_as_an_input_equals_diffusers() -> None:
    """``time_cond_proj_dim`` there: features of the strength, projected and added before the time MLP."""
    peer, ours = small(guidance_dim=12)
    cond = condition()
    guided = Condition(cond.text, cond.vector, guidance=STRENGTH)
    want = theirs(peer, guided)
    assert (want - mine(ours, guided)).abs().max() < F64
    assert (want - theirs(peer, cond)).abs().max() > 0.01

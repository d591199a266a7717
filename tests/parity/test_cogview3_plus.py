"""CogView3-Plus against diffusers' transformer, weights moved through the real key rules."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogView3PlusTransformer2DModel, CogView4Transformer2DModel

from sat.checkpoint.load import load
from sat.conditioning.conditioner import Condition
from sat.embeddings import sinusoid
from sat.mixins.rope import RoPE, rotary_angles
from sat.models.cogview3_plus import CogView3Plus
from sat.transformer import Grid
from tests.small import fill
from tests.tolerances import F32, F64


def small(*, double_norm: bool) -> tuple[CogView3PlusTransformer2DModel, CogView3Plus]:
    """The same random network twice: 2 layers, 4 heads of 8, patches of 2."""
    peer = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        out_channels=4, text_embed_dim=16, time_embed_dim=24, condition_dim=8, pos_embed_max_size=16,
        sample_size=16,
    ).double().eval()  # fmt: skip
    fill(peer)
    ours = CogView3Plus(
        dim=32, heads=4, depth=2, channels=4, patch=2, text_dim=16, text_len=7, emb_dim=24, size_dim=48,
        table_size=(16, 16), double_norm=double_norm,
    ).double().eval()  # fmt: skip
    load(ours, peer.state_dict(), "model")
    return peer, ours


def both(peer: CogView3PlusTransformer2DModel, ours: CogView3Plus) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 12, 20, generator=g).double()
    text = torch.randn(2, 7, 16, generator=g).double()
    t = torch.tensor([999, 17])
    original = torch.tensor([[96.0, 160.0], [64.0, 72.0]])
    crop, target = torch.tensor([[0.0, 0.0], [8.0, 4.0]]), torch.tensor([[96.0, 160.0], [96.0, 160.0]])
    sizes = [sinusoid(s.flatten(), 8).view(2, -1) for s in (original, crop, target)]
    cond = Condition(text, torch.cat(sizes, 1))
    with torch.no_grad():
        theirs = peer(x, text, t, original, target, crop, return_dict=False)[0]
        return theirs, ours(x, t.float(), ours.prepare(cond, (12, 20)))


def test_equals_diffusers() -> None:
    theirs, mine = both(*small(double_norm=False))
    assert theirs.std() > 0.5
    assert (theirs - mine).abs().max() < F64


def test_the_official_second_norm_is_a_small_difference() -> None:
    """The original normalises twice before the head (eps 1e-5, then 1e-6), diffusers once: traps 1."""
    theirs, mine = both(*small(double_norm=True))
    difference = (theirs - mine).abs().max() / theirs.std()
    assert F64 < difference < F32


@pytest.mark.parametrize("grid", [Grid(6, 10), Grid(16, 8), Grid(5, 5)])
def test_rotary_angles_equal_cogview4(grid: Grid) -> None:
    peer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        out_channels=4, text_embed_dim=16, time_embed_dim=24, condition_dim=8, rope_axes_dim=(16, 16),
    )  # fmt: skip
    cos, sin = peer.rope(torch.zeros(1, 4, 2 * grid.h, 2 * grid.w))
    angles = rotary_angles(grid, 16, base=Grid(16, 16))
    assert (angles.cos() - cos).abs().max() < F32
    assert (angles.sin() - sin).abs().max() < F32


def test_rotated_attention_equals_cogview4() -> None:
    """One whole CogView4 attention, text first, against our block's attention with the rope mixin."""
    from diffusers.models.attention_processor import Attention as PeerAttention
    from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor

    from sat.mixins.qk_norm import QKNorm
    from sat.transformer import Context, Transformer

    peer = PeerAttention(
        query_dim=32, heads=2, dim_head=16, out_dim=32, bias=True, qk_norm="layer_norm",
        elementwise_affine=False, eps=1e-6, processor=CogView4AttnProcessor(),
    ).double()  # fmt: skip
    fill(peer)
    mixins = {"norm": QKNorm(16), "rope": RoPE(16, 16, 16)}
    ours = Transformer(32, 2, 1, mixins).double()
    attention = ours.blocks[0].attn
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(getattr(peer, f"to_{n}"), name) for n in "qkv"]
            getattr(attention.qkv, name).copy_(torch.cat(parts))
            getattr(attention.proj, name).copy_(getattr(peer.to_out[0], name))
    text, image = torch.randn(2, 7, 32).double(), torch.randn(2, 60, 32).double()
    angles = rotary_angles(Grid(6, 10), 16, base=Grid(16, 16)).double()
    rotary = (angles.cos(), angles.sin())
    ctx = Context(grid=Grid(6, 10), rotary=rotary, prepared=True)
    with torch.no_grad():
        their_image, their_text = peer(image, text, image_rotary_emb=rotary)
        mine = attention(torch.cat([text, image], 1), ctx, 0, ours.hooks)
    assert (mine[:, :7] - their_text).abs().max() < 1e-6  # the peer rotates in float32 inside
    assert (mine[:, 7:] - their_image).abs().max() < 1e-6

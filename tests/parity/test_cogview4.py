"""CogView4's network against diffusers', weights moved through the real key rules."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogView4Transformer2DModel
from diffusers.models.transformers import transformer_cogview4
from torch import Tensor, nn

from sat.checkpoint.format import TensorInfo, as_lazy
from sat.checkpoint.load import load
from sat.checkpoint.rules import as_ours, as_theirs
from sat.conditioning.conditioner import Condition
from sat.config.build import build_empty
from sat.config.schema import Component
from sat.embeddings import sinusoid
from sat.models.cogview4 import CogView4, keys
from tests.small import fill
from tests.tolerances import EXACT, F64


def pair() -> tuple[CogView4Transformer2DModel, CogView4]:
    """The same random network twice: 2 layers, 4 heads of 8, patches of 2."""
    peer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, text_embed_dim=16, time_embed_dim=24, condition_dim=8,
        rope_axes_dim=(16, 16),
    ).double().eval()  # fmt: skip
    fill(peer)
    ours = CogView4(
        dim=32, heads=4, depth=2, channels=4, text_dim=16, emb_dim=24, size_dim=48, rope_size=(16, 16)
    ).double().eval()  # fmt: skip
    load(ours, peer.state_dict(), "model")
    return peer, ours


@pytest.fixture
def exact_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer rotates in float32 even in float64; here in float64, as ours does."""

    def rotate(x: Tensor, freqs: tuple[Tensor, Tensor], use_real_unbind_dim: int) -> Tensor:
        assert use_real_unbind_dim == -2
        cos, sin = (f.double() for f in freqs)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    monkeypatch.setattr("diffusers.models.embeddings.apply_rotary_emb", rotate)
    assert hasattr(transformer_cogview4, "CogView4AttnProcessor")


def inputs(h: int, w: int, tokens: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Condition]:
    g = torch.Generator().manual_seed(h)
    x, text = (torch.randn(2, *s, generator=g).double() for s in ((4, h, w), (tokens, 16)))
    t = torch.tensor([1000, 17])
    sizes = [
        torch.tensor(s)
        for s in ([[96.0, 160.0], [64.0, 72.0]], [[0.0, 0.0], [8.0, 4.0]], [[96.0, 160.0]] * 2)
    ]
    vector = torch.cat([sinusoid(s.flatten(), 8).view(2, -1) for s in sizes], 1)
    return x, text, t, sizes, Condition(text, vector)


@torch.no_grad()
@pytest.mark.usefixtures("exact_rotation")
@pytest.mark.parametrize(("h", "w", "tokens"), [(12, 20, 16), (32, 14, 48), (6, 8, 5)])
def test_equals_diffusers(h: int, w: int, tokens: int) -> None:
    peer, ours = pair()
    x, text, t, (original, crop, target), cond = inputs(h, w, tokens)
    theirs = peer(x, text, t, original, target, crop, return_dict=False)[0]
    mine = ours(x, t.float(), ours.prepare(cond, (h, w)))
    assert theirs.std() > 0.5
    assert (theirs - mine).abs().max() < F64


# -- the mask of the text


@torch.no_grad()
def test_under_a_mask_other_pads_change_nothing() -> None:
    _, ours = pair()
    x, text, t, _, cond = inputs(12, 20, 16)
    mask = torch.arange(16) >= torch.tensor([[5], [9]])  # left padding
    other = torch.where(mask[..., None], text, 100 * torch.randn_like(text))
    runs = [
        ours(x, t.float(), ours.prepare(Condition(own, cond.vector, mask), (12, 20))) for own in (text, other)
    ]
    assert torch.equal(*runs)
    unmasked = ours(x, t.float(), ours.prepare(cond, (12, 20)))
    assert (runs[0] - unmasked).abs().max() > 1e-3


@torch.no_grad()
def test_diffusers_own_mask_lets_pads_through() -> None:
    """Its inference processor adds the 0/1 matrix to the logits; if this fails, it was mended upstream."""
    peer, _ = pair()
    x, text, t, (original, crop, target), _ = inputs(12, 20, 16)
    mask = (torch.arange(16) >= torch.tensor([[5], [9]])).long()
    other = torch.where(mask.bool()[..., None], text, torch.randn_like(text))
    a, b = (
        peer(x, own, t, original, target, crop, return_dict=False, attention_mask=mask)[0]
        for own in (text, other)
    )
    assert (a - b).abs().max() > 1e-3


@torch.no_grad()
def test_masked_pads_equal_a_shorter_text() -> None:
    """A batch of texts of different lengths is each text by itself."""
    _, ours = pair()
    x, text, t, _, cond = inputs(12, 20, 16)
    mask = torch.arange(16) >= torch.tensor([[5], [0]])
    both = ours(x, t.float(), ours.prepare(Condition(text, cond.vector, mask), (12, 20)))
    short = Condition(text[:1, 5:], cond.vector[:1])
    alone = ours(x[:1], t[:1].float(), ours.prepare(short, (12, 20)))
    assert (both[:1] - alone).abs().max() < F64


# -- names and shapes at full size


@pytest.fixture(scope="module")
def full() -> dict[str, TensorInfo]:
    module = build_empty(Component("sat.models.cogview4.CogView4", {}))
    return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}


def on_meta(infos: dict[str, TensorInfo]) -> dict[str, Tensor]:
    return {name: torch.empty(info.shape, device="meta") for name, info in infos.items()}


def test_names_and_shapes_of_the_published_size_map_both_ways(full: dict[str, TensorInfo]) -> None:
    with torch.device("meta"):
        peer = CogView4Transformer2DModel(
            num_layers=28, attention_head_dim=128, num_attention_heads=32, text_embed_dim=4096
        )
    theirs = {name: tuple(t.shape) for name, t in peer.state_dict().items()}
    assert len(theirs) == 408
    assert sum(t.numel() for t in peer.parameters()) == 6_369_118_272
    written = as_theirs(as_lazy(on_meta(full)), keys.DIFFUSERS)
    assert {name: written.info(name).shape for name in written} == theirs
    back = as_ours(as_lazy({n: torch.empty(s, device="meta") for n, s in theirs.items()}), keys.DIFFUSERS)
    assert {name: back.info(name).shape for name in back} == {n: i.shape for n, i in full.items()}


@pytest.mark.parametrize("layout", [keys.SAT, keys.MEGATRON])
def test_names_of_training_files_map_both_ways(full: dict[str, TensorInfo], layout: keys.Rules) -> None:
    written = as_theirs(as_lazy(on_meta(full)), layout)
    assert len(written) == 296
    back = as_ours(as_lazy({n: torch.empty(written.info(n).shape, device="meta") for n in written}), layout)
    assert {name: back.info(name).shape for name in back} == {n: i.shape for n, i in full.items()}


def test_megatron_keeps_q_k_and_v_of_a_head_together() -> None:
    ours = CogView4(dim=256, heads=2, depth=1, channels=4, text_dim=16, emb_dim=24, size_dim=48)
    fill(ours)
    theirs = as_theirs(as_lazy(dict(ours.state_dict())), keys.MEGATRON)
    qkv = theirs["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = ours.transformer.blocks[0].attn.qkv.weight.chunk(3)  # type: ignore[union-attr]
    assert torch.equal(qkv, torch.cat([q[:128], k[:128], v[:128], q[128:], k[128:], v[128:]]))
    file = {name: theirs[name].clone() for name in theirs}
    file["encoder_expand_linear.weight"] = file["encoder_expand_linear.weight"].reshape(256, 4, 2, 2)
    other: nn.Module = CogView4(dim=256, heads=2, depth=1, channels=4, text_dim=16, emb_dim=24, size_dim=48)
    load(other, file, "model")
    for name, value in ours.state_dict().items():
        assert (value - other.state_dict()[name]).abs().max() == EXACT


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 30, "heads": 4}, "dim 30 is not 4 heads of a multiple of 4"),
        ({"dim": 24, "heads": 4}, "a multiple of 4, as rotary positions need"),
        ({"rope_size": [8]}, r"rope_size is \(rows, columns\)"),
        ({"patch": 0}, "patch 0"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CogView4(**{"dim": 32, "heads": 4, "depth": 1, **wrong})  # type: ignore[arg-type]

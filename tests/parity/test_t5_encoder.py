"""Hidden states against transformers' T5EncoderModel, through the real key rules."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from sat.checkpoint.format import ENGINE_PREFIXES, as_lazy
from sat.checkpoint.load import load, match
from sat.checkpoint.rules import as_theirs
from sat.mixins.text_encoder import buckets_of
from sat.models.t5 import T5Encoder, from_huggingface
from sat.models.t5.keys import HF
from tests.checkpoints import ASSETS
from tests.small import fill
from tests.tolerances import F32, F64

CONFIG = T5Config(
    vocab_size=70, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=5, feed_forward_proj="gated-gelu"
)  # 5 heads of 8 are 40, not 24: a head size taken from the width fails


@pytest.fixture
def peer():
    model = T5EncoderModel(CONFIG).double().eval()
    fill(model)
    return model


@pytest.fixture
def ours(peer):
    model = T5Encoder(**from_huggingface(CONFIG.to_dict()))
    load(model, peer.state_dict(), "text", dtype=torch.float64)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(70, (3, 37), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact_norm(monkeypatch):
    """The peer takes the mean square in float32 even in float64; here it is taken in float64, as ours is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(T5LayerNorm, "forward", forward)


@torch.no_grad()
@pytest.mark.usefixtures("exact_norm")
def test_hidden_states_equal(ours, peer, ids):
    torch.testing.assert_close(ours(ids), peer(input_ids=ids).last_hidden_state, rtol=F64, atol=F64)


@torch.no_grad()
@pytest.mark.usefixtures("exact_norm")
def test_hidden_states_equal_under_a_mask(ours, peer, ids):
    mask = torch.arange(37) < torch.tensor([[37], [20], [3]])
    theirs = peer(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours(ids, mask), theirs, rtol=F64, atol=F64)


@torch.no_grad()
def test_the_peer_differs_only_by_its_float32_norm(ours, peer, ids):
    difference = (ours(ids) - peer(input_ids=ids).last_hidden_state).abs().max()
    assert 1e-9 < difference < F32


@torch.no_grad()
def test_float32_agrees(ours, peer, ids):
    torch.testing.assert_close(
        ours.float()(ids), peer.float()(input_ids=ids).last_hidden_state, rtol=F32, atol=F32
    )


@torch.no_grad()
@pytest.mark.usefixtures("exact_norm")
def test_gradients_equal(ours, peer, ids):
    with torch.enable_grad():
        weights = torch.randn(3, 37, 24, dtype=torch.float64)
        (ours(ids) * weights).sum().backward()
        (peer(input_ids=ids).last_hidden_state * weights).sum().backward()
    theirs = {n: p.grad for n, p in peer.named_parameters()}
    mine = as_theirs(as_lazy({n: p.grad for n, p in ours.named_parameters()}), HF)
    for name, grad in theirs.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-9, atol=F64, msg=name)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 16), (16, 100), (32, 20)])
def test_buckets_equal_at_every_distance(buckets, max_distance):
    offsets = torch.arange(-700, 701)
    theirs = T5Attention._relative_position_bucket(offsets, True, buckets, max_distance)
    assert buckets_of(offsets, buckets, max_distance).equal(theirs)


@pytest.mark.parametrize("prefix", ["", ENGINE_PREFIXES["text"]])
def test_every_official_tensor_of_t5_xxl_has_its_place(prefix):
    names = json.loads((ASSETS / "t5_xxl_hf.json").read_text())
    short = {name.removeprefix(ENGINE_PREFIXES["text"]): tuple(shape) for name, shape in names.items()}
    with torch.device("meta"):
        model = T5Encoder()
        theirs = {prefix + name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in short.items()}
    report = match(model, as_lazy(theirs), "text")
    assert not report.missing and not report.unexpected and not report.ignored
    assert len(short) == 220
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656

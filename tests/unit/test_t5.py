"""The T5 encoder beyond parity: masks, float16, where its position bias is computed, plan and config."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from sat.kernels.compile import recompute
from sat.mixin import replaces
from sat.mixins.text_encoder import RelativeBias, buckets_of
from sat.models.t5 import T5Encoder, from_huggingface
from sat.models.t5.keys import SHARDING
from sat.models.t5.model import EPS
from sat.sharding import Column, Row
from sat.transformer import Context
from tests.small import fill
from tests.tolerances import F32

SMALL = {"dim": 24, "heads": 3, "head_dim": 8, "mlp_dim": 40, "depth": 2, "vocab": 50}


@pytest.fixture
def encoder():
    model = T5Encoder(**SMALL)
    fill(model)
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(50, (2, 11), generator=torch.Generator().manual_seed(0))


def test_hidden_states_have_the_shape_of_the_ids_and_the_width(encoder, ids):
    assert encoder(ids).shape == (2, 11, 24)


@torch.no_grad()
def test_masked_padding_does_not_change_the_tokens_before_it(encoder, ids):
    mask = torch.arange(11) < torch.tensor([[7], [11]])
    changed = ids.masked_fill(~mask, 3)
    torch.testing.assert_close(encoder(ids, mask)[mask], encoder(changed, mask)[mask])
    unmasked = (encoder(ids)[0, :7] - encoder(changed)[0, :7]).abs().max()
    assert unmasked > 1e-3, "without a mask padding takes part"


@torch.no_grad()
def test_a_row_does_not_see_the_others(encoder, ids):
    torch.testing.assert_close(encoder(ids)[1:], encoder(ids[1:]))


@torch.no_grad()
def test_the_position_bias_is_computed_once_for_all_layers(encoder, ids, monkeypatch):
    calls = []
    table = encoder.transformer.mixins["relative_bias"].table
    table.register_forward_hook(lambda *args: calls.append(args))
    encoder(ids)
    assert len(calls) == 1
    assert "relative_bias" in encoder.transformer.resolved.owners["prepare"]


@torch.no_grad()
def test_bias_is_the_table_entry_of_each_pair_of_positions():
    mixin = RelativeBias(heads=3, buckets=8, max_distance=16)
    fill(mixin)
    bias = mixin.prepare(lambda ctx: ctx, Context(ids=torch.zeros(1, 20, dtype=torch.long))).bias
    assert bias.shape == (1, 3, 20, 20)
    for query, key in [(0, 0), (0, 19), (19, 0), (5, 6), (6, 5), (3, 15)]:
        bucket = buckets_of(torch.tensor(key - query), 8, 16)
        assert bias[0, :, query, key].equal(mixin.table.weight[bucket])


def test_nearby_distances_have_buckets_of_their_own_and_far_ones_share():
    found = buckets_of(torch.tensor([0, -1, -7, 1, 7, -8, 8, -127, -128, -500, 500]), 32, 128).tolist()
    assert found == [0, 1, 7, 17, 23, 8, 24, 15, 15, 15, 31]


@pytest.mark.parametrize(
    ("buckets", "distance", "message"),
    [(30, 128, "buckets 30 is not a positive multiple of 4"), (32, 8, "max_distance 8 must exceed the 8")],
)
def test_impossible_buckets_are_refused(buckets, distance, message):
    with pytest.raises(ValueError, match=message):
        RelativeBias(4, buckets, distance)


@torch.no_grad()
def test_float16_survives_weights_that_leave_its_range(ids):
    """Feed-forward layers of models trained in bfloat16 (T5-XXL) exceed 65504, and so does the residual."""
    model = T5Encoder(**SMALL).eval()
    fill(model, 0.3)
    for block in model.transformer.blocks:
        block.mlp.up.weight.mul_(300)
        block.mlp.down.weight.mul_(900)
        block.attn.proj.weight.mul_(900)
    half = T5Encoder(**SMALL).half().eval()
    half.load_state_dict(model.state_dict())
    model.load_state_dict(half.state_dict())  # the same numbers, rounded once
    largest = []
    for block in model.transformer.blocks:
        for module in (block, block.mlp.down):
            module.register_forward_hook(lambda *args: largest.append(args[-1].abs().max().item()))
    wide = model(ids)
    assert max(largest) > 2 * torch.finfo(torch.float16).max, "the test must leave float16's range"
    narrow = half(ids)
    assert narrow.dtype == torch.float16
    assert narrow.isfinite().all()
    torch.testing.assert_close(narrow.float(), wide, rtol=1e-2, atol=1e-2)  # float16 has 11 bits


@torch.no_grad()
def test_bfloat16_is_close(encoder, ids):
    wide = encoder(ids)
    error = (encoder.bfloat16()(ids).float() - wide).square().mean().sqrt() / wide.square().mean().sqrt()
    assert error < 0.05  # weights of std 0.3 make sharp attention; official shapes are checked in parity


def test_it_starts_with_logits_of_order_one():
    torch.manual_seed(0)
    model = T5Encoder(dim=256, heads=4, head_dim=64, mlp_dim=512, depth=1, vocab=100)
    x = torch.randn(1, 64, 256)
    q, k, _ = model.transformer.blocks[0].attn.qkv(x).unflatten(-1, (3, 4, 64)).unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k)
    assert 0.7 < logits.std() < 1.4
    out = model(torch.randint(100, (2, 16)))
    assert 0.7 < out.std() < 1.4


def test_checkpointed_blocks_give_the_same_gradients(encoder, ids):
    def gradients():
        encoder.zero_grad()
        encoder(ids).square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters()]

    plain = gradients()
    recompute(encoder)
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=F32, atol=F32)


def test_the_plan_names_every_sharded_layer_and_fits_its_direction(encoder):
    modules = dict(encoder.named_modules())
    for pattern, style in SHARDING.items():
        found = [name for name in modules if fnmatch(name, pattern)]
        assert found, f"{pattern} matches no module"
        for name in found:
            weight = modules[name].weight
            is_table = isinstance(modules[name], nn.Embedding)
            size = weight.shape[1 if is_table or isinstance(style, Row) else 0]
            shared = 1 if isinstance(style, Row) else style.parts
            assert size // shared in ({3} if is_table else {24, 40}), "heads, heads x head_dim, mlp_dim"
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    assert all(any(fnmatch(name, pattern) for pattern in SHARDING) for name in linears)
    assert SHARDING["transformer.blocks.*.attn.qkv"] == Column(parts=3, unit="head_dim")


@torch.no_grad()
def test_heads_and_hidden_units_can_be_shared_out_by_the_plan(encoder, ids):
    """Two shares of every planned layer, run one after the other and summed where the plan says so."""
    whole = encoder.transformer.blocks[0]
    ctx = encoder.transformer.prepare(Context(ids=ids))
    x = encoder.transformer.hooks.embed(ctx)
    expected = whole.attn(x, ctx, 0, encoder.transformer.hooks)
    shares = []
    for heads in (slice(0, 1), slice(1, 3)):
        rows = slice(heads.start * 8, heads.stop * 8)
        part = T5Encoder(**(SMALL | {"heads": heads.stop - heads.start, "depth": 1}))
        block = part.transformer.blocks[0]
        block.attn.qkv.weight.copy_(whole.attn.qkv.weight.unflatten(0, (3, 24))[:, rows].flatten(0, 1))
        block.attn.proj.weight.copy_(whole.attn.proj.weight[:, rows])
        table = encoder.transformer.mixins["relative_bias"].table.weight
        part.transformer.mixins["relative_bias"].table.weight.copy_(table[:, heads])
        own = part.transformer.prepare(Context(ids=ids))
        shares.append(block.attn(x, own, 0, part.transformer.hooks))
    torch.testing.assert_close(sum(shares), expected)


CONFIG = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": EPS, "d_model": 24,
    "d_kv": 8, "num_heads": 3, "d_ff": 40, "num_layers": 2, "vocab_size": 50,
    "relative_attention_num_buckets": 32,
}  # fmt: skip


def test_a_huggingface_config_names_the_same_encoder():
    assert from_huggingface(CONFIG) == SMALL | {"buckets": 32, "max_distance": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu', only 'gated-gelu' is supported"),
        ({"model_type": "umt5"}, "model_type is 'umt5', only 't5'"),
        ({"d_ff": None}, "d_ff is None, expected a positive whole number"),
        ({"num_heads": 0}, "num_heads is 0, expected a positive whole number"),
    ],
)
def test_a_config_of_another_encoder_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_huggingface(CONFIG | change)


def test_the_original_t5_without_gates_is_refused():
    with pytest.raises(ValueError, match="feed_forward_proj is 'relu'"):
        from_huggingface({k: v for k, v in CONFIG.items() if k != "feed_forward_proj"})


def test_ids_are_asked_for(encoder):
    with pytest.raises(ValueError, match="needs token ids|for token ids"):
        encoder.transformer(Context())


def test_a_second_owner_of_the_input_is_an_error(encoder):
    from sat.mixin import HookConflictError, Mixin, resolve
    from sat.mixins.text_encoder import TokenEmbed
    from sat.transformer import TransformerHooks

    class Other(Mixin):
        host = TransformerHooks

        @replaces("embed")
        def embed(self, ctx):
            raise NotImplementedError

    with pytest.raises(HookConflictError, match="'a' and 'b' both replace hook 'embed'"):
        resolve(encoder.transformer._defaults(), {"a": TokenEmbed(4, 8), "b": Other()})

"""The parts of a text encoder: tokens of its ids, T5's position bias, GLM's rotation, the last norm."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.mixin import Mixin, replaces, wraps
from sat.transformer.hooks import Context, Prepare, TransformerHooks
from sat.transformer.transformer import RMSNorm


class TokenEmbed(Mixin):
    """Looks ``ctx.ids`` (B, T) up in a (vocab, D) table -> (B, T, D)."""

    host = TransformerHooks

    def __init__(self, vocab: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, dim)

    @replaces("embed")
    def embed(self, ctx: Context) -> Tensor:
        """(B, T, D) tokens of the context's ids."""
        if ctx.ids is None:
            raise ValueError("a text encoder needs token ids: the context has no `ids`")
        tokens: Tensor = self.table(ctx.ids)
        return tokens


# -- T5's relative position bias: how far a key is from a query shifts the attention logit, per head


def buckets_of(offsets: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each offset (key index minus query index), int64, in the shape of ``offsets``.

    Half of the buckets are for keys behind the query, half for keys ahead. Of each half, the first half holds
    one distance each (0, 1, 2, …), the rest distances growing by a constant ratio; from ``max_distance`` on
    all share the last one. Source: "Exploring the Limits of Transfer Learning", arXiv:1910.10683, section
    2.1.
    """
    half = buckets // 2
    exact = half // 2
    distance = offsets.abs()
    # Float32 on purpose: where the logarithm is a whole number, rounding decides, and the peer uses float32.
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offsets > 0)


class RelativeBias(Mixin):
    """Fills ``ctx.bias`` (1, H, T, T) from a (buckets, H) table once per forward, for all layers.

    The number of heads is read from the table's output, so a rank of a tensor-parallel group sees its share.
    """

    host = TransformerHooks

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        if buckets < 4 or buckets % 4:
            raise ValueError(
                f"buckets {buckets} is not a positive multiple of 4: two directions, each half exact"
            )
        if max_distance <= buckets // 4:
            raise ValueError(
                f"max_distance {max_distance} must exceed the {buckets // 4} distances with a bucket each"
            )
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Embedding(buckets, heads)

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        """The context with the bias of every pair of positions."""
        ctx = inner(ctx)
        if ctx.ids is None:
            raise ValueError("the relative position bias is for token ids: the context has no `ids`")
        length = ctx.ids.shape[1]
        offsets = torch.arange(1 - length, length, device=ctx.ids.device)
        per_offset = self.table(buckets_of(offsets, self.buckets, self.max_distance))  # (2T - 1, H)
        # Row i of the bias is the window of offsets -i … T-1-i: windows in reverse order, no (T, T) lookup.
        return replace(ctx, bias=per_offset.t().unfold(1, length, 1).flip(1)[None])


class FinalNorm(Mixin):
    """RMS norm of every token, (B, L, D) -> (B, L, D) in the type of the weights."""

    host = TransformerHooks

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)

    @replaces("final")
    def final(self, x: Tensor, ctx: Context) -> Tensor:
        out: Tensor = self.norm(x)
        return out


# -- a decoder-only language model: rotary positions, each token sees itself and those before


class CausalText(Mixin):
    """Rotates the first ``rotary_dim`` channels of q and k by their token's place, and attends causally.

    Neighbouring channels make a pair (k: 2k and 2k + 1), which turns by place * theta^(-2k / rotary_dim);
    places count from the first id, padding included. Angles are float32.
    Source: RoFormer, arXiv:2104.09864, on a part of the channels as in GLM-4 (peer ``GlmModel``).
    """

    host = TransformerHooks

    def __init__(self, rotary_dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels, got rotary_dim {rotary_dim}")
        self.rotary_dim, self.theta = rotary_dim, theta

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        ctx = inner(ctx)
        if ctx.ids is None:
            raise ValueError("positions of text are those of token ids: the context has no `ids`")
        device = ctx.ids.device
        channels = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        places = torch.arange(ctx.ids.shape[1], dtype=torch.float32, device=device)
        angles = torch.outer(places, 1 / self.theta ** (channels / self.rotary_dim))  # (T, rotary_dim / 2)
        return replace(ctx, rotary=(angles.cos(), angles.sin()))

    @replaces("rotate_qk")
    def rotate_qk(self, q: Tensor, k: Tensor, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        assert ctx.rotary is not None, "rotary tables are made in prepare"
        return self._rotate(q, *ctx.rotary), self._rotate(k, *ctx.rotary)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, T, d): (a, b) -> (a cos - b sin, b cos + a sin) of each pair, in float32 at least."""
        turned, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        wide = turned if turned.dtype == torch.float64 else turned.float()
        a, b = rearrange(wide, "b h t (d pair) -> pair b h t d", pair=2)
        pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([pairs.flatten(-2).to(x.dtype), rest], -1)

    @replaces("attend")
    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

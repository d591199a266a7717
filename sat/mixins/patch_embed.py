"""Image patches or feature maps become a sequence of tokens, and go back to their places."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.mixin import Mixin, replaces, wraps
from sat.transformer.hooks import Context, Prepare, TransformerHooks
from sat.transformer.transformer import LayerNorm


class PatchEmbed(Mixin):
    """Latent (B, C, h, w) -> image tokens (B, N, D); text (B, T, C_text) -> ``ctx.tokens`` (B, T, D).

    Patches are row-major; the features of one patch are ordered (channel, row, column). Both projections are
    linear layers. Text is projected once per image, in ``prepare``. Source: official ``dit.py:35``.
    """

    host = TransformerHooks

    def __init__(self, channels: int, dim: int, patch: int, text_dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(channels * patch**2, dim)
        self.text = nn.Linear(text_dim, dim)

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        ctx = inner(ctx)
        assert ctx.text is not None, "the network needs encoded text"
        return replace(ctx, tokens=self.text(ctx.text.to(self.text.weight.dtype)))

    @replaces("embed")
    def embed(self, ctx: Context) -> Tensor:
        assert ctx.image is not None, "the network gives the latent"
        patches = rearrange(ctx.image, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        tokens: Tensor = self.proj(patches)  # (B, N, D)
        return tokens


class FinalLayer(Mixin):
    """Image tokens (B, N, D) -> (B, C, h, w): modulated norm, projection, and patches back in their places.

    ``double_norm`` normalises twice (eps 1e-5, then 1e-6) as the original does through its transformer's own
    final norm; diffusers normalises once, with ``eps``. Both norms have no parameters. The adaLN rows are
    (shift, scale). Source: official ``dit.py:217``, reference notes on eps in ``docs/parity.md``.
    """

    host = TransformerHooks

    def __init__(
        self, dim: int, emb_dim: int, patch: int, channels: int, double_norm: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.patch = patch
        self.first_norm = LayerNorm(dim, 1e-5) if double_norm else nn.Identity()
        self.norm = LayerNorm(dim, eps)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, 2 * dim))
        self.linear = nn.Linear(dim, channels * patch**2)

    @replaces("final")
    def final(self, x: Tensor, ctx: Context) -> Tensor:
        shift, scale = self.adaln(ctx.emb)[:, None].chunk(2, -1)  # (B or 1, 1, D)
        x = self.norm(self.first_norm(x))
        x = torch.addcmul(shift.to(x.dtype), x, 1 + scale.to(x.dtype))  # x * (1 + scale) + shift
        x = self.linear(x.to(self.linear.weight.dtype))  # (B, N, C patch^2)
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=ctx.grid.h, p=self.patch, q=self.patch)


# -- a convolutional feature map as tokens, one a cell, and back onto the map


EPS = 1e-6
"""Of the group norm in front of a transformer; the UNet's other norms use 1e-5.

Source: official ``attention.py``.
"""


class FeatureMap(Mixin):
    """``ctx.image`` (B, C, h, w), normalised and projected, as tokens (B, h w, D); back, added to the map."""

    host = TransformerHooks

    def __init__(self, channels: int, dim: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.enter = nn.Linear(channels, dim)
        self.leave = nn.Linear(dim, channels)

    @replaces("embed")
    def embed(self, ctx: Context) -> Tensor:
        assert ctx.image is not None, "the caller gives the map"
        tokens: Tensor = self.enter(self.norm(ctx.image).flatten(2).transpose(1, 2))
        return tokens  # (B, h w, D)

    @replaces("final")
    def final(self, x: Tensor, ctx: Context) -> Tensor:
        assert ctx.image is not None, "the caller gives the map"
        cells = self.leave(x.to(self.leave.weight.dtype)).transpose(1, 2)  # (B, C, h w)
        out: Tensor = cells.reshape(ctx.image.shape) + ctx.image
        return out

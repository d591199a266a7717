"""Image patches and projected text become one token sequence, text first."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.mixin import Mixin, replaces, wraps
from sat.transformer.context import Context
from sat.transformer.hooks import Prepare, TransformerHooks


class PatchEmbed(Mixin):
    """(B, C, h, w) latent and (B, T, C_text) text -> (B, T + N, D).

    Patches are row-major; the features of one patch are ordered (channel, row, column). The projection is a
    linear layer. Text is projected once per image, in ``prepare``. Source: official ``dit.py:35``.
    """

    host = TransformerHooks
    text_alike = True

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
        assert ctx.image is not None and ctx.tokens is not None, "embed needs an image and prepared text"
        p = rearrange(ctx.image, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        return torch.cat([ctx.tokens, self.proj(p)], 1)

"""Cross-attention to the text between a block's self-attention and its MLP."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.mixin import Mixin, replaces, wraps
from sat.transformer.hooks import Context, Prepare, TransformerHooks
from sat.transformer.transformer import AffineLayerNorm, DotProduct, dtype_of, expand, shrink


class CrossLayer(nn.Module):
    """One layer: norm, projections, attention. The weight rows of ``kv`` are keys, then values, by head."""

    def __init__(self, dim: int, heads: int, head_dim: int, text_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.norm = AffineLayerNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(text_dim, 2 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, dim)
        self.attend: nn.Module = DotProduct()

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, C_text) -> keys and values (B, H, T, d)."""
        k, v = rearrange(self.kv(text), "b t (two h d) -> two b h t d", two=2, d=self.head_dim)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm(x).to(dtype_of(self.q))  # (B, L, D)
        q = rearrange(self.q(h), "b l (h d) -> b h l d", d=self.head_dim)
        out = rearrange(self.attend(q, k, v, mask), "b h l d -> b l (h d)")
        return expand(self.proj, shrink(out))  # (B, L, D)


class CrossAttention(Mixin):
    """Every layer attends to ``ctx.text`` (B, T, C_text); masked where ``ctx.text_mask`` says so.

    Keys and values do not depend on the step: ``prepare`` makes those of all layers once per image.
    Source: official ``sgm/modules/attention.py`` (``attn2``); arXiv:2112.10752.
    """

    host = TransformerHooks

    def __init__(self, dim: int, heads: int, head_dim: int, text_dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossLayer(dim, heads, head_dim, text_dim) for _ in range(depth))

    def single(self, layer: nn.Module) -> CrossAttention:
        """A mixin of one of the layers, as layer 0, for callers that treat all layers alike."""
        alone = copy.copy(self)
        alone.__dict__["_modules"] = {"layers": nn.ModuleList([layer])}
        return alone

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        ctx = inner(ctx)
        if ctx.text is None:
            raise ValueError("cross-attention needs the encoded text in the context")
        text = ctx.text.to(dtype_of(self.layers[0].kv))  # type: ignore[arg-type]
        return replace(ctx, text_kv=tuple(layer.keys_values(text) for layer in self.layers))  # type: ignore[operator]

    @replaces("cross")
    def cross(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        assert ctx.text_kv is not None, "prepare fills it"
        mask = None if ctx.text_mask is None else ctx.text_mask[:, None, None, :].to(torch.bool)
        out: Tensor = self.layers[layer](x, *ctx.text_kv[layer], mask)
        return out

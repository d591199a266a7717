"""One pre-norm block: an attention branch and an MLP branch, each optionally modulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.transformer.attention import Attention, FeedForward
from sat.transformer.context import Context, LayerModulation, Modulation
from sat.transformer.hooks import TransformerHooks


@dataclass(frozen=True)
class BlockSpec:
    """What differs between the blocks of a diffusion transformer (the defaults), of T5 and of a UNet."""

    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5
    affine: bool = False
    bias: bool = True
    qkv_bias: bool | None = None  # None: as ``bias``
    head_dim: int | None = None  # None: dim / heads
    mlp_dim: int | None = None  # None: 4 * dim
    mlp: Literal["gelu", "geglu"] = "gelu"
    gelu: Literal["tanh", "none"] = "tanh"  # how GELU is approximated
    scale: float | None = None  # of the attention logits; None: 1 / sqrt(head_dim)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32 (T5's norm: no mean, no bias)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm without parameters; the mean and variance are taken in float32 by the kernel itself."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=False)


class Block(nn.Module):
    """(B, L, D) -> (B, L, D).

    In float16 the residual stream is float32: weights trained in bfloat16 can push it beyond 65504.
    """

    def __init__(self, dim: int, heads: int, spec: BlockSpec) -> None:
        super().__init__()
        head_dim = spec.head_dim or dim // heads
        self.norm1 = _norm(dim, spec)
        qkv_bias = spec.bias if spec.qkv_bias is None else spec.qkv_bias
        self.attn = Attention(dim, heads, head_dim, bias=spec.bias, qkv_bias=qkv_bias)
        self.norm2 = _norm(dim, spec)
        self.mlp = FeedForward(
            dim, spec.mlp_dim or 4 * dim, gated=spec.mlp == "geglu", bias=spec.bias, gelu=spec.gelu
        )

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        layer: int,
        hooks: TransformerHooks,
        modulation: LayerModulation | None = None,
    ) -> Tensor:
        first, second = modulation if modulation is not None else (None, None)
        dtype = self.attn.dtype
        h = self.attn(modulated(self.norm1(x), first, ctx.text_len, dtype), ctx, layer, hooks)
        x = residual(x, h, first, ctx.text_len)
        if (crossed := hooks.cross(x, ctx, layer)) is not None:
            x = x + crossed
        h = self.mlp(modulated(self.norm2(x), second, ctx.text_len, dtype))
        return residual(x, h, second, ctx.text_len)


class AffineLayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias; takes the float32 residual stream of a float16 model as it is."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def _norm(dim: int, spec: BlockSpec) -> nn.Module:
    if spec.norm == "rms":
        return RMSNorm(dim, spec.eps)
    return AffineLayerNorm(dim, eps=spec.eps) if spec.affine else LayerNorm(dim, spec.eps)


def modulated(x: Tensor, m: Modulation | None, text_len: int, dtype: torch.dtype) -> Tensor:
    """x * (1 + scale) + shift, per stream, cast to ``dtype`` for the matrix products. ``x`` is consumed."""
    if m is None:
        return x.to(dtype)
    if torch.is_grad_enabled():
        streams = _streams(x, text_len)
        x = torch.cat(
            [torch.addcmul(m.shift[:, i : i + 1], s, 1 + m.scale[:, i : i + 1]) for i, s in streams], 1
        )
        return x.to(dtype)
    for i, stream in _streams(x, text_len):
        stream.mul_(1 + m.scale[:, i : i + 1]).add_(m.shift[:, i : i + 1])
    return x.to(dtype)


def residual(x: Tensor, branch: Tensor, m: Modulation | None, text_len: int) -> Tensor:
    """x + gate * branch, per stream. ``branch`` is consumed; ``x`` is not."""
    if m is None:
        return x + branch
    if torch.is_grad_enabled():
        parts = zip(_streams(x, text_len), _streams(branch, text_len), strict=True)
        return torch.cat(
            [torch.addcmul(a, m.gate[:, i : i + 1].to(b.dtype), b) for (i, a), (_, b) in parts], 1
        )
    for i, stream in _streams(branch, text_len):
        stream.mul_(m.gate[:, i : i + 1])
    return branch.add_(x)


def _streams(x: Tensor, text_len: int) -> list[tuple[int, Tensor]]:
    """The non-empty ones of text and image part of (B, L, D), with their row in a :class:`Modulation`."""
    sizes = [text_len, x.shape[1] - text_len]
    parts = torch.split_with_sizes(x, sizes, 1)  # slices' gradients would be whole ones, mostly zeros
    return [(i, part) for i, part in enumerate(parts) if part.shape[1]]

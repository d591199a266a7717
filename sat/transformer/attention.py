"""The two branches of a block: self-attention with one fused qkv projection, and the feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.transformer.context import Context
from sat.transformer.hooks import TransformerHooks

FP16_HEADROOM = 64.0
"""Projections back into the residual stream run at 1/64 scale in float16 and are scaled up in float32:
weights trained in bfloat16 (T5-XXL above all) produce values beyond float16's 65504."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, (B, H, L, d), by whichever kernel torch picks.

    ``mask`` (B, 1 or H, 1 or L, L) is true where a key may be seen. ``scale`` None is 1/sqrt(d). With neither
    bias nor mask no mask tensor is made, so the fast kernels apply.
    """
    if mask is not None:
        hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
        bias = hidden if bias is None else bias + hidden
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


class DotProduct(nn.Module):
    """:func:`attend` as a module without parameters, whose place another implementation can take."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, mask=mask)


class Attention(nn.Module):
    """(B, L, D) -> (B, L, D). The weight rows of ``qkv`` are q, then k, then v, each head by head.

    The number of heads is read from the projection's output, not stored: under tensor parallelism a rank sees
    only its share and nothing here changes.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, *, bias: bool, qkv_bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, dim, bias=bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return dtype_of(self.qkv)

    def forward(self, x: Tensor, ctx: Context, layer: int, hooks: TransformerHooks) -> Tensor:
        # (B, L, D) -> three of (B, H, L, d)
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, d=self.head_dim)
        q, k = hooks.norm_qk(q, k, ctx, layer)
        q, k = hooks.rotate_qk(q, k, ctx, layer)
        out = rearrange(hooks.attend(q, k, v, ctx), "b h l d -> b l (h d)")
        return expand(self.proj, shrink(out))  # (B, L, D)


class FeedForward(nn.Module):
    """Two-layer MLP with GELU, ``gelu`` its approximation; ``gated`` multiplies by a second projection.

    Plain: down(gelu(up(x))). Gated (GEGLU): down(gelu(gate(x)) * up(x)).
    """

    def __init__(self, dim: int, hidden: int, *, gated: bool, bias: bool, gelu: str = "tanh") -> None:
        super().__init__()
        self.gelu = gelu
        self.gate = nn.Linear(dim, hidden, bias=bias) if gated else None
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return expand(self.down, shrink(self.activated(self.up, x)))
        return expand(self.down, shrink(self.activated(self.gate, x)) * self.up(x))

    def activated(self, linear: nn.Module, x: Tensor) -> Tensor:
        """gelu(linear(x)), (…, hidden)."""
        return F.gelu(linear(x), approximate=self.gelu)


# -- the types of matrix products: a weight's own, and float16 without overflow


def dtype_of(linear: nn.Module) -> torch.dtype:
    """Type that ``linear`` computes in: its weight's, or what a layer without a plain weight names."""
    own = getattr(linear, "dtype", None)
    found = own if own is not None else linear.weight.dtype
    assert isinstance(found, torch.dtype)
    return found


def shrink(h: Tensor) -> Tensor:
    """``h`` itself; in float16 at 1/64 scale, so that the projection behind it cannot overflow."""
    return h / FP16_HEADROOM if h.dtype == torch.float16 else h


def expand(linear: nn.Module, h: Tensor) -> Tensor:
    """``linear`` of what :func:`shrink` returned, in full scale; float32 where ``h`` is float16."""
    out: Tensor = linear(h)
    if h.dtype != torch.float16:
        return out
    out = out.float() * FP16_HEADROOM
    bias = getattr(linear, "bias", None)
    return out if bias is None else out - (FP16_HEADROOM - 1) * bias.float()

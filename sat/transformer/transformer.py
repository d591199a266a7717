"""A transformer whose every variable part is a named hook, and its block: no parallelism, no task code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.mixin import Host, Mixin
from sat.transformer.hooks import Context, LayerModulation, Modulation, TransformerHooks

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


class GroupedAttention(Attention):
    """Attention of H query heads to fewer heads of keys and values, each for H / ``kv_heads`` in a row.

    The weight rows of ``kv`` are keys, then values. Source: arXiv:2305.13245.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, qkv_bias: bool
    ) -> None:
        nn.Module.__init__(self)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"heads {heads} are not a multiple of kv_heads {kv_heads}")
        self.head_dim = head_dim
        self.q = nn.Linear(dim, heads * head_dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, dim, bias=bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return dtype_of(self.q)

    def forward(self, x: Tensor, ctx: Context, layer: int, hooks: TransformerHooks) -> Tensor:
        q = rearrange(self.q(x), "b l (h d) -> b h l d", d=self.head_dim)
        k, v = rearrange(self.kv(x), "b l (two h d) -> two b h l d", two=2, d=self.head_dim)
        q, k = hooks.norm_qk(q, k, ctx, layer)
        q, k = hooks.rotate_qk(q, k, ctx, layer)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))  # (B, H, L, d)
        out = rearrange(hooks.attend(q, k, v, ctx), "b h l d -> b l (h d)")
        return expand(self.proj, shrink(out))  # (B, L, D)


class FeedForward(nn.Module):
    """Two-layer MLP with GELU, ``gelu`` its approximation; ``gated`` multiplies by a second projection.

    Plain: down(gelu(up(x))). Gated (GEGLU): down(gelu(gate(x)) * up(x)). ``gelu`` None is SiLU (SwiGLU),
    ``quick`` x sigmoid(1.702 x), as in CLIP.
    """

    def __init__(self, dim: int, hidden: int, *, gated: bool, bias: bool, gelu: str | None = "tanh") -> None:
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
        if self.gelu is None:
            return F.silu(linear(x))
        if self.gelu == "quick":
            h: Tensor = linear(x)
            return h * torch.sigmoid(1.702 * h)
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
    return out if bias is None else torch.sub(out, bias, alpha=FP16_HEADROOM - 1)


# -- one pre-norm block: an attention branch and an MLP branch, each optionally modulated


@dataclass(frozen=True)
class BlockSpec:
    """Choices by which the blocks of a diffusion transformer (the defaults), of T5, GLM and a UNet differ."""

    norm: Literal["layer", "rms"] = "layer"
    eps: float = 1e-5
    affine: bool = False
    bias: bool = True
    qkv_bias: bool | None = None  # None: as ``bias``
    head_dim: int | None = None  # None: dim / heads
    mlp_dim: int | None = None  # None: 4 * dim
    kv_heads: int | None = None  # heads of keys and values; None: as many as of queries, in one projection
    mlp: Literal["gelu", "geglu", "swiglu"] = "gelu"
    gelu: Literal["tanh", "none", "quick"] = "tanh"  # how GELU is approximated
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


class AffineLayerNorm(nn.LayerNorm):
    """Layer norm with weight and bias; takes the float32 residual stream of a float16 model as it is."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """(B, L, D) -> (B, L, D): x + gate1 * attention(norm(x)), then x + gate2 * mlp(norm(x)).

    In float16 the residual stream is float32: weights trained in bfloat16 can push it beyond 65504.
    """

    def __init__(self, dim: int, heads: int, spec: BlockSpec) -> None:
        super().__init__()

        def norm() -> nn.Module:
            if spec.norm == "rms":
                return RMSNorm(dim, spec.eps)
            return AffineLayerNorm(dim, eps=spec.eps) if spec.affine else LayerNorm(dim, spec.eps)

        head_dim = spec.head_dim or dim // heads
        qkv_bias = spec.bias if spec.qkv_bias is None else spec.qkv_bias
        hidden, gated = spec.mlp_dim or 4 * dim, spec.mlp != "gelu"
        gelu = None if spec.mlp == "swiglu" else spec.gelu
        self.norm1 = norm()
        if spec.kv_heads is None:
            self.attn = Attention(dim, heads, head_dim, bias=spec.bias, qkv_bias=qkv_bias)
        else:
            self.attn = GroupedAttention(
                dim, heads, spec.kv_heads, head_dim, bias=spec.bias, qkv_bias=qkv_bias
            )
        self.norm2 = norm()
        self.mlp = FeedForward(dim, hidden, gated=gated, bias=spec.bias, gelu=gelu)

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

        h = self.attn(modulated(self.norm1(x), first, ctx.segments, dtype), ctx, layer, hooks)  # (B, L, D)
        x = residual(x, h, first, ctx.segments)

        if (crossed := hooks.cross(x, ctx, layer)) is not None:
            x = x + crossed

        h = self.mlp(modulated(self.norm2(x), second, ctx.segments, dtype))  # (B, L, D)
        return residual(x, h, second, ctx.segments)


def modulated(x: Tensor, m: Modulation | None, segments: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x * (1 + scale) + shift, per segment, cast to ``dtype`` for the matrix products. ``x`` is consumed."""
    if m is None:
        return x.to(dtype)
    scale = m.scale if m.plus_one else 1 + m.scale
    if torch.is_grad_enabled() or _fuses(x):
        parts = _split(x, segments)
        x = torch.cat([torch.addcmul(m.shift[:, i : i + 1], p, scale[:, i : i + 1]) for i, p in parts], 1)
        return x.to(dtype)
    for i, part in _split(x, segments):
        if x.is_cpu:  # rounded twice, as pictures on the CPU have always been
            part.mul_(scale[:, i : i + 1]).add_(m.shift[:, i : i + 1])
        else:  # one launch
            torch.addcmul(m.shift[:, i : i + 1], part, scale[:, i : i + 1], out=part)
    return x.to(dtype)


def residual(x: Tensor, branch: Tensor, m: Modulation | None, segments: Sequence[int]) -> Tensor:
    """x + gate * branch, per segment. ``branch`` is consumed; ``x`` is not."""
    if m is None:
        return x + branch
    if torch.is_grad_enabled() or _fuses(x):
        pairs = zip(_split(x, segments), _split(branch, segments), strict=True)
        return torch.cat(
            [torch.addcmul(a, m.gate[:, i : i + 1].to(b.dtype), b) for (i, a), (_, b) in pairs], 1
        )
    if x.is_cpu:
        for i, part in _split(branch, segments):
            part.mul_(m.gate[:, i : i + 1])
        return branch.add_(x)
    for (i, a), (_, b) in zip(_split(x, segments), _split(branch, segments), strict=True):
        torch.addcmul(a, m.gate[:, i : i + 1], b, out=b)
    return branch


def _fuses(x: Tensor) -> bool:
    """True for the compiler of an accelerator: it makes one launch of all, but breaks off at an ``out=``."""
    return torch.compiler.is_compiling() and not x.is_cpu


def _split(x: Tensor, segments: Sequence[int]) -> list[tuple[int, Tensor]]:
    """The non-empty segments of (B, L, D), with their row in a :class:`Modulation`."""
    # Not slices: the gradient of a slice is a whole tensor, mostly zeros.
    parts = torch.split_with_sizes(x, list(segments) or [x.shape[1]], 1)
    return [(i, part) for i, part in enumerate(parts) if part.shape[1]]


# -- the blocks in a row, between an ``embed`` and a ``final`` hook


class Transformer(Host[TransformerHooks]):
    """``depth`` blocks of width ``dim`` over one sequence, between an ``embed`` and a ``final`` hook.

    The sequence may consist of segments (``ctx.segments``), each with a row of its own in a modulation; what
    they mean is the mixins' business. ``print(transformer.resolved)`` shows who owns each hook. Parallelism,
    kernels and recomputed activations are mixins too, added to a built transformer by :meth:`extend`.
    """

    def __init__(
        self, dim: int, heads: int, depth: int, mixins: Mapping[str, Mixin], spec: BlockSpec | None = None
    ) -> None:
        super().__init__()
        spec = spec or BlockSpec()
        if min(dim, heads, depth) < 1:
            raise ValueError(f"dim {dim}, heads {heads} and depth {depth} must all be at least 1")
        if spec.head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not divisible by heads {heads}")
        self.spec = spec
        self.blocks = nn.ModuleList(Block(dim, heads, spec) for _ in range(depth))
        self.mixins = nn.ModuleDict(mixins)
        self._resolve()

    @property
    def hooks(self) -> TransformerHooks:
        """The hooks in use."""
        return self.resolved.hooks

    def prepare(self, ctx: Context) -> Context:
        """``ctx`` with everything filled in that depends on the text and the size but not on the step.

        A hook that has prepared the whole context itself says so by ``ctx.prepared``.
        """
        ctx = self.hooks.prepare(ctx)
        return ctx if ctx.prepared else replace(ctx, table=self.hooks.position(ctx), prepared=True)

    def modulations(self, emb: Tensor) -> Tensor | None:
        """Modulations for the rows of ``emb`` (steps, E), each as ``ctx.modulation``; None without any.

        One matrix product a layer for all steps of a run, instead of one a layer and step.
        """
        every: Tensor | None = None
        for layer in range(len(self.blocks)):
            if (branches := self.hooks.modulate(Context(emb=emb), layer)) is None:
                return None
            parts = torch.stack([x for m in branches for x in (m.shift, 1 + m.scale, m.gate)], 1)
            if every is None:
                every = parts.new_empty(len(emb), len(self.blocks), 6, 1, *parts.shape[2:])
            every[:, layer, :, 0] = parts  # (steps, 6, S, D)
        return every

    def modulation(self, ctx: Context, layer: int) -> LayerModulation | None:
        """Modulation of one layer: of the step, where all steps' were computed before, else computed now."""
        if ctx.modulation is None:
            return self.hooks.modulate(ctx, layer)
        a, b, c, d, e, f = ctx.modulation[layer].unbind()  # (1, S, D) each
        return Modulation(a, b, c, True), Modulation(d, e, f, True)

    def forward(self, ctx: Context) -> Tensor:
        return self.hooks.run(ctx if ctx.prepared else self.prepare(ctx))

    def _defaults(self) -> TransformerHooks:
        return TransformerHooks(
            prepare=self._prepare,
            run=self._run,
            embed=self._embed,
            position=self._position,
            modulate=self._modulate,
            norm_qk=self._same,
            rotate_qk=self._same,
            attend=self._attend,
            cross=self._cross,
            layer=self._layer,
            final=self._final,
        )

    def _prepare(self, ctx: Context) -> Context:
        return ctx

    def _run(self, ctx: Context) -> Tensor:
        x = self.hooks.embed(ctx)  # (B, L, D)
        if ctx.table is not None:
            x = x + ctx.table
        if x.dtype == torch.float16:
            x = x.float()
        for layer in range(len(self.blocks)):
            x = self.hooks.layer(x, ctx, layer)
        return self.hooks.final(x, ctx)

    def _embed(self, ctx: Context) -> Tensor:
        raise NotImplementedError(
            "no mixin provides the 'embed' hook: a transformer needs one (see sat/mixins)"
        )

    def _position(self, ctx: Context) -> Tensor | None:
        return None

    def _modulate(self, ctx: Context, layer: int) -> LayerModulation | None:
        return None

    def _same(self, q: Tensor, k: Tensor, ctx: Context, layer: int) -> tuple[Tensor, Tensor]:
        return q, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        return attend(q, k, v, bias=ctx.bias, mask=ctx.key_mask, scale=self.spec.scale)

    def _cross(self, x: Tensor, ctx: Context, layer: int) -> Tensor | None:
        return None

    def _layer(self, x: Tensor, ctx: Context, layer: int) -> Tensor:
        out: Tensor = self.blocks[layer](x, ctx, layer, self.hooks, self.modulation(ctx, layer))
        return out

    def _final(self, x: Tensor, ctx: Context) -> Tensor:
        return x

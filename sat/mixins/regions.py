"""Regional prompts: the text of a region meets the image cells of that region.

Put on a built network for one picture (:func:`attached`); neither network nor samplers know of it. Regions
are a :class:`~sat.control_input.ControlInput` called :data:`NAME`: its value is their encoded text, its
strengths the mixing share (0 in the unconditional half of guidance), its start and end the range of noise.
Letters: T_0 tokens of the prompt for the whole picture, T_r those of region r, R regions, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.control_input import ControlInput
from sat.mixin import Mixin, wraps
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Attend, Cross, Prepare

NAME = "regions"


@dataclass(frozen=True)
class Areas:
    """Places of the regions, and the lengths of their texts."""

    masks: Tensor  # (R, h, w) in [0, 1] over the picture, at any resolution
    lengths: tuple[int, ...]  # (R,) text tokens
    text_mask: Tensor | None = None  # (1, sum of lengths) true = real token


@dataclass(frozen=True)
class _Prepared:
    """Everything of one batch that no step changes."""

    areas: Areas
    allowed: Tensor | None = None  # (1 or B, 1, L, L) of joint attention: who sees whom
    kv: tuple[tuple[Tensor, Tensor], ...] = ()  # of cross-attention: keys and values of the regions' text


def regions(text: Tensor, areas: Areas, share: float, start: float = 0.0, end: float = 1.0) -> ControlInput:
    """The input of regions for B rows: ``text`` (B, sum of lengths, C_text), mixed in by ``share``."""
    strengths = (share,) * len(text)
    return ControlInput(NAME, text, strengths, start, end, guess=True, made=_Prepared(areas))


@contextmanager
def attached(network: nn.Module) -> Iterator[None]:
    """Meanwhile, every transformer of ``network`` reads regions, inside whatever shares out its tokens."""
    found = [module for module in network.modules() if isinstance(module, Transformer)]
    for transformer in found:
        outer = cast("Mixin | None", dict(transformer.mixins.items()).get("sequence"))
        if outer is not None:
            transformer.remove("sequence")
        own: Callable[[Tensor, int], Tensor] = getattr(outer, "_own", lambda x, dim: x)
        crosses = transformer.resolved.owners["cross"] != ("default",)
        transformer.extend(NAME, CrossRegions(own) if crosses else JointRegions())
        if outer is not None:
            transformer.extend("sequence", outer)
    try:
        yield
    finally:
        for transformer in found:
            transformer.remove(NAME)


class JointRegions(Mixin):
    """Regions on joint attention: their text joins the sequence behind the prompt's, in front of the image.

    Attention is done twice. Plain: prompt and image, as without regions. Regional: text of region r with
    itself and its image cells, cells of a region with its text and with each other, cells of none with the
    prompt and all cells. Image tokens get plain + share (regional - plain); the prompt's tokens get plain.
    Source: arXiv:2411.02395.
    """

    host = TransformerHooks

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        if (own := _input(ctx)) is None:
            return inner(ctx)
        assert ctx.text is not None, "joint attention has text"
        first, areas = ctx.text.shape[1], own.made.areas
        text = torch.cat([ctx.text, own.value.to(ctx.text.dtype)], 1)  # (B, T, C), T = T_0 + T_1 + … + T_R
        mask = ctx.text_mask
        if mask is not None or areas.text_mask is not None:
            parts = [ctx.text.new_ones(len(text), first, dtype=torch.bool) if mask is None else mask]
            length = text.shape[1] - first
            known = areas.text_mask
            whole = parts[0].new_ones(1, length) if known is None else known.to(text.device)
            mask = torch.cat([parts[0], whole.expand(len(text), -1)], 1)
        inside = (
            F.adaptive_avg_pool2d(areas.masks.to(text.device)[None], (ctx.grid.h, ctx.grid.w))[0] >= 0.5
        )  # (R, h, w)
        allowed = _joint_mask(first, areas.lengths, inside.flatten(1))
        if mask is not None:  # padding is seen by nothing but itself
            keys = F.pad(mask, (0, allowed.shape[-1] - mask.shape[1]), value=True)[:, None, None]
            allowed = allowed & keys | torch.eye(allowed.shape[-1], dtype=torch.bool, device=text.device)
        ctx = inner(replace(ctx, text=text, text_mask=mask))
        return ctx.controlled(NAME, lambda c: _Prepared(areas, allowed))

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if (own := _input(ctx)) is None:
            return inner(q, k, v, ctx)
        made, whole = own.made, ctx.segments[0]
        first = whole - sum(made.areas.lengths)
        # Plain: (B, H, T_0 + N, d), without the regions' tokens.
        q0, k0, v0 = (torch.cat([x[:, :, :first], x[:, :, whole:]], 2) for x in (q, k, v))
        keys = ctx.key_mask
        keys = None if keys is None else torch.cat([keys[..., :first], keys[..., whole:]], -1)
        plain = inner(
            q0, k0, v0, replace(ctx, segments=(first, *ctx.segments[1:]), key_mask=keys, controls=())
        )
        # Regional: (B, H, L, d), masked.
        regional = inner(q, k, v, replace(ctx, key_mask=made.allowed, controls=()))
        image = _mixed(plain[:, :, first:], regional[:, :, whole:], own)
        return torch.cat([plain[:, :, :first], regional[:, :, first:whole], image], 2)


class CrossRegions(Mixin):
    """Regions on cross-attention: each cell attends to the text of its regions, averaged where they overlap.

    Cells get plain + share (regional - plain), with plain the attention to the prompt; cells of no region
    keep it. ``own`` takes a rank's share of the tokens along a dimension.
    """

    host = TransformerHooks

    def __init__(self, own: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.own = own

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        if (own := _input(ctx)) is None:
            return inner(ctx)
        found = inner(replace(ctx, text=own.value, text_mask=None, controls=())).text_kv
        assert found is not None, "cross-attention prepares keys and values"
        areas = own.made.areas
        return inner(ctx).controlled(NAME, lambda c: _Prepared(areas, None, found))

    @wraps("cross")
    def cross(self, inner: Cross, x: Tensor, ctx: Context, layer: int) -> Tensor | None:
        plain = inner(x, ctx, layer)
        if (own := _input(ctx)) is None or plain is None:
            return plain
        assert ctx.image is not None, "a transformer over a map gets the map"
        made, areas = own.made, own.made.areas
        h, w = ctx.image.shape[2:]
        weights = F.adaptive_avg_pool2d(areas.masks.to(x.device)[None], (h, w))[0].flatten(1)  # (R, N)
        weights = self.own(weights.to(plain.dtype), 1)[..., None]  # (R, l, 1)
        total, start = torch.zeros_like(plain), 0
        for weight, length in zip(weights, areas.lengths, strict=True):
            part = slice(start, start + length)
            kv = tuple((k[:, :, part], v[:, :, part]) for k, v in made.kv)
            mask = (
                None if areas.text_mask is None else areas.text_mask[:, part].to(x.device).expand(len(x), -1)
            )
            out = inner(x, replace(ctx, text_kv=kv, text_mask=mask), layer)
            assert out is not None, "it is not without regions"
            total, start = total + weight * out, start + length
        sums = weights.sum(0)  # (l, 1)
        regional = torch.where(sums > 0, total / sums.clamp(min=1e-6), plain)
        # At a region's soft edge, as much as it covers the cell.
        return plain + sums.clamp(max=1) * (_mixed(plain, regional, own) - plain)


def _input(ctx: Context) -> ControlInput | None:
    return next((own for own in ctx.controls if own.name == NAME), None)


def _mixed(plain: Tensor, regional: Tensor, own: ControlInput) -> Tensor:
    """plain + share (regional - plain), with a share for each row."""
    share = torch.tensor(own.strengths, dtype=plain.dtype, device=plain.device)
    return torch.lerp(plain, regional, share.view(-1, *[1] * (plain.ndim - 1)))


def _joint_mask(first: int, lengths: tuple[int, ...], inside: Tensor) -> Tensor:
    """(1, 1, L, L), true where a query (row) may see a key; ``inside`` (R, N): the cells of each region."""
    text = first + sum(lengths)
    count = text + inside.shape[1]
    allowed = torch.zeros(count, count, dtype=torch.bool, device=inside.device)
    none = ~inside.any(0)  # (N,) cells of no region
    cells = inside.float()
    allowed[text:, text:] = (cells.T @ cells > 0) | none[:, None]
    allowed[text:, :first] = none[:, None]
    allowed[:first, :first] = True  # their output is the plain one
    start = first
    for region, length in zip(inside, lengths, strict=True):
        own = slice(start, start + length)
        allowed[own, own] = True
        allowed[own, text:], allowed[text:, own] = region, region[:, None]
        start += length
    return allowed[None, None]

"""Joint attention: text and image tokens as one sequence in which both attend to both."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.mixin import Mixin, wraps
from sat.transformer.hooks import Attend, Context, Embed, Final, Position, Prepare, TransformerHooks


class JointAttention(Mixin):
    """Text tokens (B, T, D) and image tokens (B, N, D) in one sequence (B, T + N, D), text first.

    The segments are (T, N): a modulation has row 0 for text and row 1 for the image. Position table and head
    are those of the image alone: text has no position, and the head gets no text. Where ``ctx.text_mask`` is
    given, no token attends to the text it hides. Source: official ``dit.py``; MMDiT, arXiv:2403.03206.

    A text token that stands for ``ctx.text_repeat`` equal ones is attended to as often as all of them: its
    keys and values are repeated. As queries equal tokens stay equal from layer to layer, so one is enough.
    """

    host = TransformerHooks

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        ctx = inner(ctx)
        assert ctx.tokens is not None, "the patch embedding projects the text"
        segments = (ctx.tokens.shape[1], ctx.grid.h * ctx.grid.w)  # (T, N)
        if ctx.text_mask is None:
            return replace(ctx, segments=segments)
        mask = F.pad(ctx.text_mask, (0, segments[1]), value=True)  # (B, T + N)
        return replace(ctx, segments=segments, key_mask=mask[:, None, None])

    @wraps("embed")
    def embed(self, inner: Embed, ctx: Context) -> Tensor:
        assert ctx.tokens is not None, "embed needs prepared text"
        return torch.cat([ctx.tokens, inner(ctx)], 1)  # (B, T + N, D)

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        table = inner(ctx)  # (1, N, D)
        return None if table is None else F.pad(table, (0, 0, ctx.segments[0], 0))  # zeros for text

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        if ctx.text_repeat > 1:
            t, times = ctx.segments[0], ctx.text_repeat
            k, v = (torch.cat([x[:, :, :t].repeat_interleave(times, 2), x[:, :, t:]], 2) for x in (k, v))
        return inner(q, k, v, ctx)

    @wraps("final")
    def final(self, inner: Final, x: Tensor, ctx: Context) -> Tensor:
        return inner(x[:, ctx.segments[0] :], ctx)  # (B, N, D)

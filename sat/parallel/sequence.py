"""Sequence parallelism: each rank works on a share of the tokens, and in attention on a share of the heads.

Between entry and exit of a transformer a rank has its share of each segment, text and image. Norms,
projections and MLPs work token by token. Attention needs all tokens, but works head by head: an all-to-all
before it gives each rank some heads of every token, another after it gives the tokens back.
Source: DeepSpeed-Ulysses, arXiv:2309.14509.

Gradients average over the ranks, as in data parallelism. Outside a transformer every rank computes the same;
inside, a rank's gradients are its tokens' part of the sum, times the number of ranks.

Letters: S ranks, l this rank's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from sat.control_input import ImageTokens, KeysValues
from sat.mixin import Mixin, wraps
from sat.parallel.collectives import stacked
from sat.parallel.launch import ALONE, Axis
from sat.parallel.tensor import summed
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Attend, Embed, Final, Position, Prepare


def apply_sequence(network: nn.Module, axis: Axis) -> None:
    """Share the tokens of every transformer of ``network`` over the ranks of ``axis``.

    Layers between transformers (a UNet's convolutions) are computed whole by every rank.
    """
    if axis.size == 1:
        return
    found = [module for module in network.modules() if isinstance(module, Transformer)]
    if not found:
        raise ValueError(
            f"parallel.sequence {axis.size} shares the tokens of transformers, and {type(network).__name__} "
            f"has none: set it to 1"
        )
    for transformer in found:
        transformer.extend("sequence", SequenceParallel(axis))


def token_axis(network: nn.Module) -> Axis:
    """The ranks that share the tokens of ``network``'s transformers."""
    return next((m.axis for m in network.modules() if isinstance(m, SequenceParallel)), ALONE)


def token_mean(x: Tensor, axis: Axis) -> Tensor:
    """Mean (B, D) over the tokens of all ranks of (B, l, D), inside a transformer; equal on every rank."""
    if axis.size == 1:
        return x.mean(1)
    count = torch.full_like(x[:1, 0, :1], x.shape[1])
    total: Tensor = _Sum.apply(x.sum(1), axis)  # type: ignore[no-untyped-call]
    return total / summed(count, axis)


@dataclass(frozen=True)
class LocalContext(Context):
    """Context of this rank's tokens; ``whole`` is the context of all tokens."""

    whole: Context = field(default_factory=Context)


def shares(count: int, ranks: int) -> list[int]:
    """Shares of ``count`` items for each rank: equal, or one more on the first ranks."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


class SequenceParallel(Mixin):
    """Cuts the tokens at a transformer's entry and joins them at its exit; holds no parameters.

    A sequence without segments has one token for each cell of ``ctx.image``. Token and head counts need not
    divide: shares differ by one at most. A single text token that stands for many (``ctx.text_repeat``) is
    the first rank's; each rank repeats the keys of its heads.
    """

    host = TransformerHooks

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        """Context of this rank's tokens."""
        whole = inner(ctx)
        rotary = whole.rotary
        if rotary is not None:
            rotary = (self._own(rotary[0], 0), self._own(rotary[1], 0))
        values = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
        segments = tuple(shares(length, self.axis.size)[self.axis.rank] for length in whole.segments)
        controls = tuple(
            replace(own, made=ImageTokens(self._own(own.made.tokens, 1)))
            if isinstance(own.made, ImageTokens)
            else own
            for own in whole.controls
        )
        values |= {"segments": segments, "rotary": rotary, "controls": controls}
        return LocalContext(**values, whole=whole)

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        """Rows of the position table for this rank's tokens."""
        whole = _whole(ctx)
        table = inner(whole)
        if table is None:
            return None
        parts = torch.split(table, list(whole.segments) or table.shape[1], 1)
        return torch.cat([self._own(part, 1) for part in parts], 1)

    @wraps("embed")
    def embed(self, inner: Embed, ctx: Context) -> Tensor:
        """Tokens of this rank (B, l, D); every rank embeds all of them."""
        whole = _whole(ctx)
        x, segments = inner(whole), _segments(whole)
        if x.shape[1] != sum(segments):
            raise ValueError(
                f"parallel.sequence: the transformer has {x.shape[1]} tokens, expected segments of {segments}"
            )
        parts = [part for part in torch.split(x, segments, 1) if part.shape[1]]
        own: list[Tensor] = [_Split.apply(part, self.axis) for part in parts]  # type: ignore[no-untyped-call]
        return own[0] if len(own) == 1 else torch.cat(own, 1)

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """(B, H, l, d) of this rank's tokens: its share of the heads attends over all tokens in between."""
        whole, axis = _whole(ctx), self.axis
        batch, count, length, size = q.shape
        heads = shares(count, axis.size)
        mine, first = heads[axis.rank], sum(heads[: axis.rank])
        segments = [shares(n, axis.size) for n in _segments(whole)]  # of each segment, by rank
        lengths = [sum(own) for own in zip(*segments, strict=True)]  # of each rank

        # To each rank its heads of this rank's tokens; from each, this rank's heads of its tokens.
        x = rearrange([q, k, v], "three b h l d -> (h b three l d)")
        unit = 3 * batch * size
        sizes = [mine * unit * n for n in lengths]
        x = _all_to_all(x, [h * unit * length for h in heads], sizes, axis)
        parts = [
            part.view(mine, batch, 3, n, size) for part, n in zip(torch.split(x, sizes), lengths, strict=True)
        ]

        # All tokens of the first segment in order, then of the next: (3, B, H / S, L, d).
        pieces = zip(*(part.split(own, 3) for part, *own in zip(parts, *segments, strict=True)), strict=True)
        x = torch.cat([piece for segment in pieces for piece in segment], 3)
        q, k, v = rearrange(x, "h b three l d -> three b h l d")
        if any(isinstance(own.made, KeysValues) for own in ctx.controls):
            whole = replace(
                whole,
                controls=tuple(
                    replace(own, made=own.made.of_heads(first, mine, count))
                    if isinstance(own.made, KeysValues)
                    else own
                    for own in ctx.controls
                ),
            )
        if whole.bias is not None:
            whole = replace(whole, bias=whole.bias[:, first : first + mine])
        out = inner(q, k, v, whole) if mine else q  # (B, H / S, L, d)

        # The way back: to each rank its tokens, from each its heads.
        of_segments = zip(torch.split(out, [sum(own) for own in segments], 2), segments, strict=True)
        of_ranks = zip(*(torch.split(part, own, 2) for part, own in of_segments), strict=True)
        x = torch.cat([torch.cat(part, 2).reshape(-1) for part in of_ranks])
        unit = batch * size
        sizes = [h * unit * length for h in heads]
        x = _all_to_all(x, [mine * unit * n for n in lengths], sizes, axis)
        parts = [
            part.view(batch, h, length, size) for part, h in zip(torch.split(x, sizes), heads, strict=True)
        ]
        return torch.cat(parts, 1)

    @wraps("final")
    def final(self, inner: Final, x: Tensor, ctx: Context) -> Tensor:
        """Output for the last segment of all ranks, the image, on every rank; heads do not read others."""
        whole = _whole(ctx)
        *before, last = _segments(whole)
        own = shares(last, self.axis.size)[self.axis.rank]
        image: Tensor = _Join.apply(x[:, x.shape[1] - own :], last, self.axis)  # type: ignore[no-untyped-call]
        return inner(image, replace(whole, segments=(*[0] * len(before), last)))

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of ``x`` along ``dim``."""
        return torch.split(x, shares(x.shape[dim], self.axis.size), dim)[self.axis.rank]


def _whole(ctx: Context) -> Context:
    """Context of all tokens, with the fields that hooks have filled in this rank's since."""
    assert isinstance(ctx, LocalContext), "the wrapped prepare makes it"
    return replace(ctx.whole, image=ctx.image, emb=ctx.emb, modulation=ctx.modulation)


def _segments(ctx: Context) -> list[int]:
    """Lengths of the segments of all tokens; without segments, the number of cells of the map."""
    if ctx.segments:
        return list(ctx.segments)
    assert ctx.image is not None, "a transformer over a map gets the map"
    return [ctx.image.shape[2] * ctx.image.shape[3]]


def _all_to_all(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    """Send flat ``x`` in pieces of the sizes ``send``, one a rank; return the pieces of all, joined."""
    out: Tensor = _AllToAll.apply(x, send, receive, axis.group)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    """All-to-all of unequal pieces; gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = (receive, send, group)
        out = x.new_empty(sum(receive))
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back: Tensor = _AllToAll.apply(gradient, *ctx.way)  # type: ignore[no-untyped-call]
        return back, None, None, None


class _Split(torch.autograd.Function):
    """(B, N, D), equal on all ranks -> this rank's share (B, n, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.count = axis, x.shape[1]
        return _share(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.count, ctx.axis) / ctx.axis.size, None


class _Join(torch.autograd.Function):
    """(B, n, D) -> tokens of all ranks in order (B, N, D), equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gathered(x, count, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _share(gradient, ctx.axis) * ctx.axis.size, None, None


class _Sum(torch.autograd.Function):
    """A rank's part of a sum over tokens -> the sum, equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.size = axis.size
        return summed(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


def _share(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the tokens of (B, N, D)."""
    return torch.split(x, shares(x.shape[1], axis.size), 1)[axis.rank].contiguous()


def _gathered(x: Tensor, count: int, axis: Axis) -> Tensor:
    """Concatenate (B, n, D) of every rank to (B, ``count``, D); shorter shares are sent padded."""
    lengths = shares(count, axis.size)
    padded = x.new_zeros(x.shape[0], lengths[0], x.shape[2])
    padded[:, : x.shape[1]] = x
    parts = zip(stacked(axis, padded), lengths, strict=True)
    return torch.cat([part[:, :length] for part, length in parts], 1)

"""Sequence parallelism: every rank works on some of the tokens; for attention they swap tokens for heads.

Between the entry and the exit of a transformer a rank has its share of the text and of the image tokens.
Norms, projections and MLPs need no more. Attention needs all tokens, but one head at a time: an all-to-all
before it gives each rank some heads of every token, another after it gives the tokens back.
Source: DeepSpeed-Ulysses, arXiv:2309.14509.

Gradients are those of data parallelism: the mean over the ranks is the gradient. Outside, every rank computes
the same; inside, a rank's gradients are its tokens' part of the sum, times the number of ranks.

Letters: S ranks, t and n this rank's text and image tokens, l = t + n.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.mixin import Mixin, wraps
from sat.parallel.collectives import stacked
from sat.parallel.mesh import Axis
from sat.transformer import Context, Transformer, TransformerHooks
from sat.transformer.hooks import Attend, Embed, Final, Position, Prepare


def apply_sequence(network: nn.Module, axis: Axis) -> None:
    """Have every transformer of ``network`` share its tokens over the ranks of ``axis``.

    What lies between transformers (a UNet's convolutions) every rank computes whole.
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


@dataclass(frozen=True)
class Part(Context):
    """The context of this rank's tokens: what belongs to single tokens is cut; ``whole`` is the uncut one."""

    whole: Context = field(default_factory=Context)


def shares(count: int, ranks: int) -> list[int]:
    """``count`` dealt to ``ranks`` as evenly as can be, the first getting what is left over."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


class SequenceParallel(Mixin):
    """Cuts the tokens at a transformer's entry and joins them at its exit; holds no parameters.

    There is one image token for each patch of ``ctx.grid`` or, where that is empty, each cell of
    ``ctx.image``. Any number of tokens and heads will do: shares differ by one. A single text token that
    stands for many (``ctx.text_repeat``) is the first rank's; each rank repeats its keys of the heads it has.
    """

    host = TransformerHooks
    text_alike = True

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    @wraps("prepare")
    def prepare(self, inner: Prepare, ctx: Context) -> Context:
        """The context of this rank's tokens."""
        whole = inner(ctx)
        rotary = whole.rotary
        if rotary is not None:
            rotary = (self._own(rotary[0], 0), self._own(rotary[1], 0))
        values = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
        mine = shares(whole.text_len, self.axis.size)[self.axis.rank]
        return Part(**values | {"text_len": mine, "rotary": rotary}, whole=whole)

    @wraps("position")
    def position(self, inner: Position, ctx: Context) -> Tensor | None:
        """This rank's rows of the position table."""
        whole = _whole(ctx)
        table = inner(whole)
        if table is None:
            return None
        text, image = table[:, : whole.text_len], table[:, whole.text_len :]
        return torch.cat([self._own(text, 1), self._own(image, 1)], 1)

    @wraps("embed")
    def embed(self, inner: Embed, ctx: Context) -> Tensor:
        """(B, l, D): every rank embeds all tokens and keeps its own."""
        whole = _whole(ctx)
        x = inner(whole)
        if x.shape[1] != whole.text_len + _cells(whole):
            raise ValueError(
                f"parallel.sequence: the transformer has {x.shape[1]} tokens, expected "
                f"{whole.text_len} of text and {_cells(whole)} of the image"
            )
        text, image = x[:, : whole.text_len], x[:, whole.text_len :]
        parts = [self._cut(part) for part in (text, image) if part.shape[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @wraps("attend")
    def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
        """(B, H, l, d): attention of its heads over all tokens, brought back to its tokens."""
        whole, axis = _whole(ctx), self.axis
        heads = shares(q.shape[1], axis.size)
        text, image = shares(whole.text_len, axis.size), shares(_cells(whole), axis.size)
        q, k, v = _tokens_of_heads(q, k, v, heads, text, image, axis)
        if whole.bias is not None:
            first = sum(heads[: axis.rank])
            whole = replace(whole, bias=whole.bias[:, first : first + heads[axis.rank]])
        out = inner(q, k, v, whole) if heads[axis.rank] else q
        return _heads_of_tokens(out, heads, text, image, axis)

    @wraps("final")
    def final(self, inner: Final, x: Tensor, ctx: Context) -> Tensor:
        """The output of the head for the image tokens of all ranks, on each of them."""
        whole = _whole(ctx)
        image: Tensor = _Join.apply(x[:, ctx.text_len :], _cells(whole), self.axis)  # type: ignore[no-untyped-call]
        return inner(image, replace(whole, text_len=0))  # no head looks at text

    def _cut(self, x: Tensor) -> Tensor:
        """This rank's share of the tokens (B, N, D), differentiable."""
        out: Tensor = _Split.apply(x, self.axis)  # type: ignore[no-untyped-call]
        return out

    def _own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's share of ``x`` along ``dim``."""
        return torch.split(x, shares(x.shape[dim], self.axis.size), dim)[self.axis.rank]


def _whole(ctx: Context) -> Context:
    """The context of all tokens, with what has been added to this rank's since."""
    assert isinstance(ctx, Part), "the wrapped prepare makes it"
    return replace(ctx.whole, image=ctx.image, emb=ctx.emb, modulation=ctx.modulation)


def _cells(ctx: Context) -> int:
    """The number of image tokens."""
    if ctx.grid.h:
        return ctx.grid.h * ctx.grid.w
    assert ctx.image is not None, "a transformer over a map gets the map"
    return ctx.image.shape[2] * ctx.image.shape[3]


def _tokens_of_heads(
    q: Tensor, k: Tensor, v: Tensor, heads: list[int], text: list[int], image: list[int], axis: Axis
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, l, d) of this rank's tokens -> (B, H / S, L, d) of all tokens in order, of its heads."""
    batch, _, length, size = q.shape
    mine, lengths = heads[axis.rank], [t + n for t, n in zip(text, image, strict=True)]
    packed = torch.stack([q, k, v], 2).transpose(0, 1).reshape(-1)
    unit = 3 * batch * size
    sizes = [mine * unit * there for there in lengths]
    got = _exchange(packed, [n * unit * length for n in heads], sizes, axis)
    pieces = zip(torch.split(got, sizes), lengths, strict=True)
    parts = [piece.view(mine, batch, 3, there, size) for piece, there in pieces]
    texts = [part[..., :t, :] for part, t in zip(parts, text, strict=True)]
    images = [part[..., t:, :] for part, t in zip(parts, text, strict=True)]
    q, k, v = torch.cat(texts + images, 3).permute(2, 1, 0, 3, 4)
    return q, k, v


def _heads_of_tokens(out: Tensor, heads: list[int], text: list[int], image: list[int], axis: Axis) -> Tensor:
    """(B, H / S, L, d) of all tokens -> (B, H, l, d): what the other heads have for this rank's tokens."""
    batch, mine, _, size = out.shape
    texts, images = torch.split(out, [sum(text), sum(image)], 2)
    pieces = zip(torch.split(texts, text, 2), torch.split(images, image, 2), strict=True)
    packed = torch.cat([torch.cat([t, n], 2).reshape(-1) for t, n in pieces])
    unit = batch * size
    length = text[axis.rank] + image[axis.rank]
    lengths = [t + n for t, n in zip(text, image, strict=True)]
    sizes = [n * unit * length for n in heads]
    got = _exchange(packed, [mine * unit * there for there in lengths], sizes, axis)
    parts = zip(torch.split(got, sizes), heads, strict=True)
    return torch.cat([part.view(batch, n, length, size) for part, n in parts], 1)


def _exchange(x: Tensor, send: list[int], receive: list[int], axis: Axis) -> Tensor:
    """Flat ``x`` in pieces of ``send`` to each rank; the pieces of ``receive`` that come from each."""
    got: Tensor = _AllToAll.apply(x, send, receive, axis.group)  # type: ignore[no-untyped-call]
    return got


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
    """(B, N, D), the same on all ranks -> this rank's share (B, n, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.count = axis, x.shape[1]
        return _share(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradient, ctx.count, ctx.axis) / ctx.axis.size, None


class _Join(torch.autograd.Function):
    """(B, n, D) -> the tokens of all ranks in order (B, N, D), the same on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gathered(x, count, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _share(gradient, ctx.axis) * ctx.axis.size, None, None


def _share(x: Tensor, axis: Axis) -> Tensor:
    """This rank's share of the tokens of (B, N, D)."""
    return torch.split(x, shares(x.shape[1], axis.size), 1)[axis.rank].contiguous()


def _gathered(x: Tensor, count: int, axis: Axis) -> Tensor:
    """(B, n, D) of every rank, one after the other: (B, ``count``, D). Shorter shares travel padded."""
    lengths = shares(count, axis.size)
    padded = x.new_zeros(x.shape[0], lengths[0], x.shape[2])
    padded[:, : x.shape[1]] = x
    parts = zip(stacked(axis, padded), lengths, strict=True)
    return torch.cat([part[:, :length] for part, length in parts], 1)

"""Attention head by head on a CPU for logits known to be small, without looking for the largest.

softmax subtracts the largest logit lest exp overflow. Where q and k are normalised there is nothing to fear:
a power of two of the logits (which costs less than exp), a product with v and a column of ones, which sums
the rows, and one division. Each thread has heads of its own, as products of one head are small: shared out
one by one, every one of them would end in waiting.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.kernels.packed import product

LARGEST_LOGIT = 20.0
"""Above, exp of a logit would lose the sums' precision in bfloat16 and could overflow in products of many."""
_BYTES = {torch.bfloat16: 8 << 20, torch.float32: 3 << 20}
"""Of one head's logits; larger ones are made in pieces of rows."""
_ONES = 8
"""Columns beside a head's channels: one would do, but rows of odd length are slow."""

Head = tuple[int, int]
"""Row of the batch, head."""


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """True if ``dtype`` is supported here: float32 takes oneDNN's linear, which is private to torch."""
    if dtype != torch.float32 or not torch.backends.mkldnn.enabled:
        return dtype == torch.bfloat16
    x, weight = torch.linspace(-1, 1, 48).view(3, 16), torch.linspace(-1, 1, 80).view(16, 5)
    try:
        with torch.inference_mode():  # with a weight that lies crosswise
            return torch.allclose(product(x, weight.t(), None), x @ weight, atol=1e-5)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


# -- operators of their own, so that a compiler and whoever counts operations see each as one


def heads_apart(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v, (B, H, L, d) each, for logits of at most :data:`LARGEST_LOGIT`.

    Returns the output, and log2 of the sums of the rows, (B, H, L), which is empty but in float32. On two
    cores of some processors it takes two thirds of the time of torch's kernel in bfloat16, and half of it in
    float32, forwards and backwards; on others it is slower (:mod:`sat.kernels.measured`). In bfloat16
    logits and weights are rounded to it, and there is no gradient.
    """
    out, sums = _outputs(q)
    if q.dtype == torch.float32:
        _share_out(q, lambda which: _single(q, k, v, scale, (out, sums), which))
    else:
        _share_out(q, lambda which: _rounded(q, k, v, scale, out, which))
    return out, sums


by_head = torch.library.custom_op(
    "cogview3::exp_attention",
    heads_apart,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
)


@by_head.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q)


def heads_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, float32."""
    found = _like(q), _like(k), _like(v)

    def some(which: Sequence[Head]) -> None:
        for head in which:
            given = _Saved(*(x[head] for x in (q, k, v, out, sums, gradient)))
            _back(given, scale, [x[head] for x in found])

    _share_out(q, some)
    return found


_backward = torch.library.custom_op(
    "cogview3::exp_attention_backward",
    heads_back,
    mutates_args=(),
    schema="(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums, float scale)"
    " -> (Tensor, Tensor, Tensor)",
)


@_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, ctx.scale = inputs
    ctx.save_for_backward(*given, *output)
    ctx.mark_non_differentiable(output[1])


def _turn(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors, ctx.scale), None


by_head.register_autograd(_turn, setup_context=_keep)

forward = torch.ops.cogview3.exp_attention
backward = torch.ops.cogview3.exp_attention_backward
"""As whoever counts operations sees them."""


def _like(x: Tensor) -> Tensor:
    """An empty (B, H, L, d) whose heads lie side by side, as the layers before and after want them."""
    batch, heads, length, size = x.shape
    return x.new_empty(batch, length, heads, size).transpose(1, 2)


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3] if q.dtype == torch.float32 else 0)


# -- some heads


def _rounded(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, which: Sequence[Head]) -> None:
    """Into ``out`` the attention of the heads ``which``, in bfloat16."""
    size, keys, rows = q.shape[3], k.shape[2], _rows(q, k)
    logits, wide = q.new_empty(rows, keys), q.new_ones(keys, size + _ONES)
    sums = q.new_empty(rows, size + _ONES)
    for head in which:
        wide[:, :size] = v[head]
        for part in _pieces(q, rows):
            some = q[head][part]
            weights, total = logits[: len(some)], sums[: len(some)]
            torch.addmm(weights, some, k[head].t(), beta=0, alpha=scale * math.log2(math.e), out=weights)
            torch.mm(weights.exp2_(), wide, out=total)
            torch.div(total[:, :size], total[:, size : size + 1], out=out[head][part])


def _single(
    q: Tensor, k: Tensor, v: Tensor, scale: float, into: tuple[Tensor, Tensor], which: Sequence[Head]
) -> None:
    """``into`` output and log2 of the sums the attention of the heads ``which``, in float32 by oneDNN."""
    size, rows, (out, log_sums) = q.shape[3], _rows(q, k), into
    wide = q.new_ones(size + _ONES, k.shape[2])
    for head in which:
        wide[:size] = v[head].t()
        scaled = k[head] * (scale * math.log2(math.e))
        for part in _pieces(q, rows):
            total = product(product(q[head][part], scaled, None).exp2_(), wide, None)
            sums = total[:, size : size + 1]
            torch.div(total[:, :size], sums, out=out[head][part])
            torch.log2(sums[:, 0], out=log_sums[head][part])


class _Saved(NamedTuple):
    """Tensors of one head for the backward pass, (L, d) each; log2 of the sums (L)."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    log_sums: Tensor
    gradient: Tensor


def _back(head: _Saved, scale: float, into: Sequence[Tensor]) -> None:
    """The gradients of q, k and v, from that of the output, ``into`` (L, d) each.

    Weights P are made again, with rows that sum to one. With dP = dO v^T: dS = P (dP - sum(P dP)), and the
    sum is that of dO O. What is taken away from the logits (log2 of the sums) and from dP comes in by the
    products themselves, as one more channel that meets a one.
    """
    q, k, v, gradient, (for_q, for_k, for_v) = head.q, head.k, head.v, head.gradient, into
    scaled, beside_v = _with(k * (scale * math.log2(math.e)), 1.0), _with(v, 1.0)
    less, turned = -(gradient * head.out).sum(1), (k * scale).t().contiguous()
    back_k, back_v = k.new_zeros(k.shape[::-1]), v.new_zeros(v.shape[::-1])
    for part in _pieces(q, _rows(q, k)):
        weights = product(_with(q[part], -head.log_sums[part]), scaled, None).exp2_()
        change = product(_with(gradient[part], less[part]), beside_v, None).mul_(weights)
        for_q[part] = product(change, turned, None)
        back_k += product(q[part].t(), change.t(), None)
        back_v += product(gradient[part].t(), weights.t(), None)
    torch.mul(back_k.t(), scale, out=for_k)
    for_v.copy_(back_v.t())


def _with(x: Tensor, more: Tensor | float) -> Tensor:
    """(L, d) with ``more`` as one more channel, and zeros up to :data:`_ONES`."""
    size = x.shape[1]
    wide = x.new_zeros(len(x), size + _ONES)
    wide[:, :size] = x
    wide[:, size] = more
    return wide


def _rows(q: Tensor, k: Tensor) -> int:
    """Of the logits of q and k (…, L, d) to make at once."""
    return min(q.shape[-2], max(64, _BYTES[q.dtype] // (k.shape[-2] * q.element_size())))


def _pieces(q: Tensor, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, q.shape[-2], rows)]


# -- threads


def _share_out(q: Tensor, some: Callable[[Sequence[Head]], None]) -> None:
    """``some`` for all heads of ``q``, shared out over threads."""
    every = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    count = min(torch.get_num_threads(), len(every))
    if count == 1:
        some(every)
        return
    inference = torch.is_inference_mode_enabled()

    def alone(which: Sequence[Head]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            some(which)

    list(_lone_threads(os.getpid(), count).map(alone, [every[first::count] for first in range(count)]))


@functools.cache
def _lone_threads(process: int, count: int) -> ThreadPoolExecutor:
    """``count`` threads in which torch computes with one thread each; ``process`` is the one they are of.

    What they multiply by must be oneDNN: MKL has one number of threads for all.
    """
    before, together = torch.get_num_threads(), Barrier(count)

    def begin(_: int) -> None:
        torch.get_num_threads()  # torch's own start of a thread would undo what follows
        torch.set_num_threads(1)
        together.wait()  # so that there are ``count`` threads

    pool = ThreadPoolExecutor(count)
    list(pool.map(begin, range(count)))
    torch.set_num_threads(before)
    return pool

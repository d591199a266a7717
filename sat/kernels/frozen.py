"""Frozen linears in training on a CPU: packed for both passes, alone or with low-rank factors beside them.

Nothing but the product with the input and, backwards, with the transposed weight is ever asked of a frozen
weight: both are kept in oneDNN's order, in place of the original. Low-rank factors join the same pass: their
change is added to the output where it lies, and those of a fused layer share one product with the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sat.kernels.packed import PackedLinear, packable, product, reordered


class FrozenLinear(PackedLinear):
    """``linear`` of (…, I) -> (…, O) without trained weights; gradients flow to its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.turned = reordered(linear.weight.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        return cast(Tensor, _Frozen.apply(x, self))  # type: ignore[no-untyped-call]

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU of the output; in one pass where no gradient needs what is before it."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().gelu(x, approximate)
        return F.gelu(self(x), approximate=approximate)

    def plain(self) -> nn.Linear:
        """An ordinary linear with the same weight, frozen."""
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias, requires_grad=False)
        return made.train(self.training)


class _Frozen(torch.autograd.Function):
    """The product alone; nothing has to be kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return product(x, layer.packed, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return product(gradient.contiguous(), ctx.layer.turned, None), None


class LowRank(NamedTuple):
    """Factors of one part of a layer's outputs: ``scale`` up down x is added to them. r is the rank."""

    part: int
    down: Tensor  # (r, I)
    up: Tensor  # (O / parts, r)
    scale: float


def adapted(x: Tensor, layer: FrozenLinear, parts: int, pairs: Sequence[LowRank]) -> Tensor:
    """``layer(x)`` (…, O) plus the change of ``pairs``, each on one of ``parts`` equal shares of outputs."""
    places = tuple((pair.part, pair.scale) for pair in pairs)
    factors = [*(pair.down for pair in pairs), *(pair.up for pair in pairs)]
    return cast(Tensor, _Adapted.apply(x, layer, parts, places, *factors))  # type: ignore[no-untyped-call]


class _Adapted(torch.autograd.Function):
    """Base and factors in one: out_p = W_p x + b_p + s_p B_p A_p x, with all A_p in one product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: FrozenLinear,
        parts: int,
        places: tuple[tuple[int, float], ...],
        *factors: Tensor,
    ) -> Tensor:
        downs, ups = factors[: len(places)], factors[len(places) :]
        rows = x.reshape(-1, layer.in_features)
        low = rows @ torch.cat(downs).t()
        out = product(rows, layer.packed, layer.bias)
        lows = torch.split(low, [len(down) for down in downs], 1)
        for (part, scale), up, own in zip(places, ups, lows, strict=True):
            out.chunk(parts, 1)[part].addmm_(own, up.t(), alpha=scale)
        ctx.layer, ctx.parts, ctx.places, ctx.shape = layer, parts, places, x.shape
        ctx.save_for_backward(rows, low, *factors)
        return out.view(*x.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, *factors = ctx.saved_tensors
        downs, ups = factors[: len(ctx.places)], factors[len(ctx.places) :]
        ranks = [len(down) for down in downs]
        flat = gradient.reshape(len(rows), -1).contiguous()
        chunks = flat.chunk(ctx.parts, 1)
        inner, grown = torch.empty_like(low), []  # gradient of ``low``; of the ups
        for (part, scale), up, own, back in zip(
            ctx.places, ups, torch.split(low, ranks, 1), torch.split(inner, ranks, 1), strict=True
        ):
            torch.mm(chunks[part], up, out=back).mul_(scale)
            grown.append((chunks[part].t() @ own).mul_(scale))
        shrunk = torch.split(inner.t() @ rows, ranks)
        below = None
        if ctx.needs_input_grad[0]:
            below = product(flat, ctx.layer.turned, None).addmm_(inner, torch.cat(downs)).view(ctx.shape)
        return below, None, None, None, *shrunk, *grown


def freezable(linear: nn.Module) -> bool:
    """Whether :class:`FrozenLinear` can stand for ``linear``: plain, frozen, of a type that packs here."""
    if type(linear) is not nn.Linear or any(p.requires_grad for p in linear.parameters()):
        return False
    return linear.weight.device.type == "cpu" and packable(linear.weight.dtype)

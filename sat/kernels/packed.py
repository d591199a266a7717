"""Weights laid out for oneDNN, and frozen layers whose backward pass needs no weight gradient."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sat.parallel.tensor import ColumnLinear, RowLinear, summed
from sat.transformer.transformer import Attention, Block, FeedForward

log = logging.getLogger(__name__)

AT_ONCE = 1 << 20
"""Values that GELU is taken of together: what it makes on the way is no larger."""
ROWS = 2048
"""For how many rows oneDNN lays a weight out; others are as right, and about as fast."""


class PackedLinear(nn.Module):
    """``linear`` of (…, I) -> (…, O) with a packed weight, for inference alone: nothing flows back.

    float32 results differ from the plain layer's in the last bits (another order of sums); bfloat16 ones
    were the same. ``bias`` False leaves the layer's out.
    """

    def __init__(self, linear: nn.Linear, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias.detach() if bias and linear.bias is not None else None
        self.packed = reordered(linear.weight.detach())

    @property
    def weight(self) -> Tensor:
        """The weight as it was, made anew each time."""
        return self.packed.to_dense()

    def plain(self) -> nn.Linear:
        """An ordinary linear with the same weight, frozen."""
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias, requires_grad=False)
        return made.train(self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        """Nothing here is ever written to, and packed tensors cannot be copied: both share them."""
        other = copy.copy(self)
        memo[id(self)] = other
        return other

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        return product(x, self.packed, self.bias)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU of the output, (…, O); ``approximate`` as in torch."""
        return product(x, self.packed, self.bias, "gelu", approximate)


class PackedRowLinear(nn.Module):
    """A :class:`sat.parallel.tensor.RowLinear` with a packed weight."""

    def __init__(self, row: RowLinear) -> None:
        super().__init__()
        self.tensor, self.dtype, self.bias = row.tensor, row.weight.dtype, row.bias
        self.product = PackedLinear(row, bias=False)  # it is added once, after the sum

    def forward(self, x: Tensor) -> Tensor:
        """This rank's share (…, I / ranks) of the inputs -> (…, O) on every rank."""
        out = summed(self.product(x), self.tensor)
        return out if self.bias is None else out.add_(self.bias)


class PackedFeedForward(FeedForward):
    """A feed-forward layer with packed linears: GELU is taken in the pass of the first."""

    def __init__(self, plain: FeedForward) -> None:
        nn.Module.__init__(self)
        self.gelu, self.gate, self.up, self.down = plain.gelu, plain.gate, plain.up, plain.down
        self.train(plain.training)

    def activated(self, linear: nn.Module, x: Tensor) -> Tensor:
        if isinstance(linear, PackedLinear) and self.gelu is not None:
            return linear.gelu(x, self.gelu)
        return super().activated(linear, x)


class SigmoidFeedForward(PackedFeedForward):
    """A feed-forward layer whose GELU, by tanh, is taken after the product as x sigmoid(2 z), in float32.

    z = sqrt(2 / pi) (x + 0.044715 x^3), and (1 + tanh z) / 2 = sigmoid(2 z). Without AVX-512 tanh takes
    several times as long as the exponential in the sigmoid.
    """

    def activated(self, linear: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = linear(x)
        twice = 2 * math.sqrt(2 / math.pi)
        rows = out.view(-1, out.shape[-1])
        for some in torch.split(rows, max(1, AT_ONCE // rows.shape[1])):
            z = torch.mul(some, some).mul_(0.044715 * twice).add_(twice).mul_(some)
            some.mul_(z.sigmoid_())
        return out


def pack(model: nn.Module) -> int:
    """Replace the linears of all attention and feed-forward layers in ``model``; returns their number.

    Only plain and split layers on the CPU, in a type that oneDNN multiplies fast here; adapted and quantised
    ones stay as they are, and so do packed ones.
    """
    found = list(_packable(model))
    for module, name in found:  # each plain weight goes before the next is packed
        child = getattr(module, name)
        setattr(module, name, _MADE[type(child)](child))
    join_gelu(model)
    return len(found)


def packs_any(model: nn.Module) -> bool:
    """True if :func:`pack` would replace a layer."""
    return next(_packable(model), None) is not None


def _packable(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(owner, name) of the linears that are packed."""
    for module in [m for m in model.modules() if isinstance(m, (Attention, FeedForward))]:
        for name, child in module.named_children():
            if type(child) in _MADE and child.weight.device.type == "cpu" and packable(child.weight.dtype):
                yield module, name


_MADE: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.Linear: PackedLinear, ColumnLinear: PackedLinear, RowLinear: PackedRowLinear
}  # fmt: skip


def join_gelu(model: nn.Module) -> None:
    """Let the feed-forward layers of ``model`` with a packed first linear take GELU in its pass."""
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        first: nn.Module = block.mlp.up if block.mlp.gate is None else block.mlp.gate
        if isinstance(first, PackedLinear) and not isinstance(block.mlp, PackedFeedForward):
            block.mlp = PackedFeedForward(block.mlp)


def by_sigmoid(model: nn.Module) -> int:
    """Let layers of ``model`` that take GELU by tanh in float32 take it by a sigmoid; returns their number.

    For inference alone, and put on after :func:`pack`.
    """
    found = list(_with_tanh(model))
    for block in found:
        block.mlp = SigmoidFeedForward(block.mlp)
    return len(found)


def takes_tanh(model: nn.Module) -> bool:
    """True if :func:`by_sigmoid` would change a layer."""
    return next(_with_tanh(model), None) is not None


def _with_tanh(model: nn.Module) -> Iterator[Block]:
    for block in [m for m in model.modules() if isinstance(m, Block)]:
        plain = block.mlp.gelu == "tanh" and block.mlp.gate is None
        if (
            plain
            and block.attn.dtype == torch.float32
            and type(block.mlp) in (FeedForward, PackedFeedForward)
        ):
            yield block


@functools.cache
def packable(dtype: torch.dtype) -> bool:
    """True if the operators are there, take ``dtype``, give the right numbers and pay on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.enabled:
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        x, weight, bias = (torch.linspace(-1, 1, n, dtype=dtype) for n in (48, 64 * 16, 64))
        x, weight = x.view(3, 16), weight.view(64, 16)
        with torch.inference_mode():
            packed = reordered(weight)
            ours = product(x, packed, bias, "gelu", "tanh")
            plain = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias), approximate="tanh")
            same = torch.equal(packed.to_dense(), weight)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        log.info(
            "weights are not packed: this torch's oneDNN operators differ (%s)", str(error).splitlines()[0]
        )
        return False
    return same and torch.allclose(ours, plain, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def reordered(weight: Tensor) -> Tensor:
    """(O, I) in oneDNN's own order, for :func:`product`."""
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return out


def product(x: Tensor, packed: Tensor, bias: Tensor | None, after: str = "none", how: str = "") -> Tensor:
    """(…, I) -> (…, O); ``after``: what follows in the same pass, "gelu", and ``how``: its approximation."""
    operator = cast(Any, torch.ops.mkldnn._linear_pointwise)
    out: Tensor = operator(x, packed, bias, after, [], how)
    return out


# -- frozen linears in training on a CPU: packed for both passes, alone or with low-rank factors beside them
#
# Nothing but the product with the input and, backwards, with the transposed weight is ever asked of a frozen
# weight: both are kept in oneDNN's order, in place of the original. Low-rank factors join the same pass:
# their change is added to the output where it lies, and those of a fused layer share one product with the
# input.


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
    """True if :class:`FrozenLinear` can stand for ``linear``: plain, frozen, of a type that packs here."""
    if type(linear) is not nn.Linear or any(p.requires_grad for p in linear.parameters()):
        return False
    return linear.weight.device.type == "cpu" and packable(linear.weight.dtype)

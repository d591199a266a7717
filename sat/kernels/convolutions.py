"""Convolutions of an autoencoder by oneDNN: packed weights, and maps channels last from end to end.

torch turns every float32 map for a convolution and back, orders its weight anew at each call, and gives
small maps to another, slower library. Here a weight is ordered once, and a map is turned where it comes in
and where it leaves.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.first_stage.model import Pointwise, Upsample, phases
from sat.kernels import packed

log = logging.getLogger(__name__)

FEW = 1024
"""Cells from which torch sums a map channels last by threads, so that its norm depends on their number."""

SIDE_BY_SIDE = 16
"""Cells that are summed as one row, where their number divides by it."""


class _Shared(nn.Module):
    """Packed tensors cannot be copied and are never written to: a deep copy shares them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        other = copy.copy(self)
        memo[id(self)] = other
        return other


class PackedConv(_Shared):
    """``conv`` of (B, C_in, h, w) -> (B, C_out, h', w') channels last, for inference: nothing flows back.

    Results differ from the plain layer's in the last bits (another order of sums). ``leaves``: the map goes
    to others, and is turned back.
    """

    def __init__(self, conv: nn.Conv2d, *, leaves: bool = False) -> None:
        super().__init__()
        self.padding, self.stride, self.leaves = _pair(conv.padding), _pair(conv.stride), leaves
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.packed = reordered(conv.weight.detach(), self.padding, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        out = convolved(x, self.packed, self.bias, self.padding, self.stride)
        return out.contiguous() if self.leaves else out


class PackedPointwise(_Shared):
    """A 1x1 convolution as a product of packed weights with the channels of every cell."""

    def __init__(self, conv: Pointwise) -> None:
        super().__init__()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.packed = packed.reordered(conv.weight.detach()[:, :, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w), channels last."""
        rows = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        return packed.product(rows, self.packed, self.bias).permute(0, 3, 1, 2)


class PackedUpsample(_Shared):
    """An :class:`sat.first_stage.model.Upsample` whose four 2x2 kernels are added up and packed once."""

    def __init__(self, plain: Upsample) -> None:
        super().__init__()
        weight, bias = plain.conv.weight.detach(), plain.conv.bias
        halves = [phases(half, 3) for half in phases(weight, 2)]
        self.kernels = [[reordered(kernel, (0, 0)) for kernel in half] for half in halves]
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        b, c, h, w = x.shape
        size, last = (b, c, 2 * h, 2 * w), torch.channels_last
        out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=last)
        x = F.pad(x.contiguous(memory_format=last), (1, 1, 1, 1))  # oneDNN's own depends on the threads here
        for row, half in enumerate(self.kernels):
            for column, kernel in enumerate(half):
                part = convolved(x, kernel, self.bias, (0, 0))  # one cell too many each way
                out[..., row::2, column::2] = part[..., row : row + h, column : column + w]
        return out


class RowsNorm(nn.Module):
    """Group norm of maps channels last, to the same bits with any number of threads.

    A channel's variance is about its own mean, to which the spread of the group's means is added: nothing
    cancels.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps, self.weight, self.bias = norm.num_groups, norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        b, c, h, w = x.shape
        if x.is_contiguous() or h * w < FEW:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h w, C)
        means = of_cells(rows)  # (B, C)
        spread = of_cells(F.mse_loss(rows, means[:, None].expand_as(rows), reduction="none"))
        own = means.view(b, self.groups, -1)  # (B, G, C / G)
        mean = own.mean(2, keepdim=True)  # (B, G, 1)
        variance = (spread.view_as(own) + (own - mean).square()).mean(2, keepdim=True)
        scale = (variance + self.eps).rsqrt() * self.weight.view(self.groups, -1)  # (B, G, C / G)
        shift = torch.addcmul(self.bias.view(self.groups, -1), mean, scale, value=-1)
        out = torch.addcmul(shift.view(b, 1, c), rows, scale.view(b, 1, c))  # x scale + shift
        return out.view(b, h, w, c).permute(0, 3, 1, 2)


def of_cells(rows: Tensor) -> Tensor:
    """Means (B, C) over the cells of (B, N, C), sixteen side by side: threads share columns, no sum."""
    b, n, c = rows.shape
    k = math.gcd(n, SIDE_BY_SIDE)
    return rows.view(b, n // k, k * c).sum(1).view(b, k, c).sum(1).div_(n)


def pack_convolutions(module: nn.Module) -> int:
    """Replace the convolutions, doublings and group norms in a float32 ``module``; returns their number.

    Maps go through it channels last, and leave by a convolution ``head`` as they came.
    """
    count = 0
    for name, child in list(module.named_children()):
        made: nn.Module | None = None
        if type(child) is Upsample:
            made = PackedUpsample(child)
        elif type(child) is nn.Conv2d:
            made = PackedConv(child, leaves=name == "head")
        elif type(child) is Pointwise and name == "shortcut":
            made = PackedPointwise(child)
        elif type(child) is nn.GroupNorm and child.affine:
            made = RowsNorm(child)
        if made is None:
            count += pack_convolutions(child)
        else:
            setattr(module, name, made.train(child.training))
            count += 1
    return count


def convolved(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int] = (1, 1),
) -> Tensor:
    """(B, C_in, h, w) -> (B, C_out, h', w') channels last, by a weight of :func:`reordered`."""
    operator = cast(Any, torch.ops.mkldnn._convolution_pointwise)
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = operator(x, packed, bias, [*padding], [*stride], [1, 1], 1, "none", [], "")
    return out


def reordered(weight: Tensor, padding: Sequence[int], stride: Sequence[int] = (1, 1)) -> Tensor:
    """(C_out, C_in, k, k) in oneDNN's own order, for :func:`convolved`; maps of other sizes take it too."""
    operator = cast(Any, torch.ops.mkldnn._reorder_convolution_weight)
    size = [1, weight.shape[1], SIDE, SIDE]
    out: Tensor = operator(weight.contiguous(), [*padding], [*stride], [1, 1], 1, size)
    return out


SIDE = 32
"""Cells each way of the maps that oneDNN lays a weight out for; others are as right, and about as fast."""


@functools.cache
def convolvable() -> bool:
    """True if the operators are there and give the right numbers."""
    if not torch.backends.mkldnn.enabled:
        return False
    try:
        x, weight, bias = (torch.linspace(-1, 1, n) for n in (8 * 63, 16 * 72, 16))
        x, weight = x.view(1, 8, 7, 9), weight.view(16, 8, 3, 3)
        with torch.inference_mode():
            ours = convolved(x, reordered(weight, (1, 1)), bias, (1, 1))
            plain = F.conv2d(x, weight, bias, padding=1)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        log.info("convolutions are not packed: this torch's oneDNN operators differ (%s)", reason)
        return False
    return ours.is_contiguous(memory_format=torch.channels_last) and torch.allclose(
        ours, plain, rtol=1e-4, atol=1e-4
    )


def _pair(size: Any) -> tuple[int, int]:
    """Padding or stride of both axes, as numbers."""
    first, second = size
    return int(first), int(second)

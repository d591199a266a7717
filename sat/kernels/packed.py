"""Linears without gradients on a CPU: the weight in oneDNN's own order, bias and GELU in the same pass.

An ordinary linear has its weight reordered in every call. These keep it reordered, and *only* so: the
original goes, for two copies of a network are too many. The operators are private to torch and may change:
:func:`packable` tries them once, and where they fail nothing is packed and everything works as before.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

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


@runtime_checkable
class Packable(Protocol):
    """A linear that is more than its product, and knows how to be packed."""

    weight: Tensor

    def packed(self) -> nn.Module:
        """The same with a packed weight, for inference alone."""
        ...


@functools.cache
def packable(dtype: torch.dtype) -> bool:
    """Whether the operators are there, take ``dtype``, give the right numbers and pay on this processor."""
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

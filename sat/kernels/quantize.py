"""Linears whose weights are kept as int8 or int4 and made whole for each product.

Letters: I inputs, O outputs of a linear, G groups of neighbouring inputs that share a scale in each output.
Products are in the type of the activations: nothing is rounded but the weights. That is the faster way on
large batches of tokens too: torch's packed int8 product took 50 times as long on 2,496 rows on a CPU.

Sources: absmax scales as in arXiv:2208.07339 (without outliers); of int4, scales with a sign, so that all 16
levels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["int8", "int4"]

GROUP = 32
"""Inputs that share a scale in int4: with scales in bf16 a weight takes 4.5 bits."""

AT_ONCE = 1 << 20
"""Weights of a linear that are quantised together."""


@dataclass(frozen=True)
class Scheme:
    """A way to keep weights. ``group`` inputs share a scale; None is a whole row in int8, 32 in int4."""

    kind: Kind
    group: int | None = None

    def size(self, inputs: int) -> int:
        """The largest number of inputs a group may have that divides ``inputs``."""
        wanted = self.group or (inputs if self.kind == "int8" else GROUP)
        return next(size for size in range(min(wanted, inputs), 0, -1) if inputs % size == 0)


class QuantizedLinear(nn.Module):
    """(…, I) -> (…, O) by a weight of small integers times scales; in place of ``linear``, whose bias it has.

    ``weight`` is made whole each time it is read. Codes and scales are buffers that no ``state_dict`` has: a
    model is saved with its plain weights, or not at all.
    """

    codes: Tensor  # (O, I) int8, or (O, I / 2) uint8 of two nibbles, the even input in the lower one
    scales: Tensor  # (O, G), of the type of the weight
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = scheme
        self.register_parameter("bias", linear.bias)
        if scheme.kind == "int4" and self.in_features % 2:
            raise ValueError(f"int4 keeps two inputs in a byte, but a layer has {self.in_features}")
        codes, scales = quantized(linear.weight.detach(), scheme)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, when it is whole."""
        return self.scales.dtype

    @property
    def weight(self) -> Tensor:
        """(O, I), made anew."""
        return whole(self.codes, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        if (
            torch.is_grad_enabled()
        ):  # what a plain product would keep for its backward pass is the whole weight
            return cast(Tensor, _Product.apply(x, self.bias, self.codes, self.scales))  # type: ignore[no-untyped-call]
        return F.linear(x, self.weight, self.bias)

    def plain(self) -> nn.Linear:
        """A linear with the weight made whole."""
        with torch.device("meta"):
            made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        made.weight = nn.Parameter(self.weight, requires_grad=False)
        made.register_parameter("bias", self.bias)
        return made.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, kind and groups, for ``print``."""
        groups = self.scales.shape[1]
        return f"{self.in_features}, {self.out_features}, {self.scheme.kind}, {groups} groups"


class _Product(torch.autograd.Function):
    """x W^T + b that keeps the codes of W, not W; the gradient is that of x and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.dtype = x.dtype
        return F.linear(x, whole(codes, scales), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        codes, scales = ctx.saved_tensors
        (gradient,) = gradients
        down = biased = None
        if ctx.needs_input_grad[0]:
            down = (gradient @ whole(codes, scales).to(gradient.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            biased = gradient.flatten(0, -2).sum(0).to(scales.dtype)
        return down, biased, None, None


def quantized(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales (O, G) of ``weight`` (O, I), each weight the nearest code times its scale.

    Some rows at a time: in float32 a large weight would be three times as much as the model gains by it.
    """
    outputs, inputs = weight.shape
    int8 = scheme.kind == "int8"
    codes = weight.new_empty(
        outputs, inputs if int8 else inputs // 2, dtype=torch.int8 if int8 else torch.uint8
    )
    scales = weight.new_empty(outputs, inputs // scheme.size(inputs))
    if weight.is_meta or hasattr(weight, "fake_device"):  # shapes alone, of an estimate
        return codes, scales
    step = max(1, AT_ONCE // inputs)
    for begin in range(0, outputs, step):
        rows = slice(begin, begin + step)
        codes[rows], scales[rows] = _rows(weight[rows], scheme)
    return codes, scales


def _rows(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows of a weight."""
    outputs, inputs = weight.shape
    size = scheme.size(inputs)
    rows = weight.float().view(outputs, inputs // size, size)
    largest = rows.abs().amax(-1)
    if scheme.kind == "int8":
        scales = largest / 127
    else:  # the largest weight becomes -8, whatever its sign
        peak = torch.where(rows.amax(-1) == largest, largest, -largest)
        scales = peak / -8
    scales = torch.where(scales == 0, 1.0, scales).to(weight.dtype)
    codes = (rows / scales.float()[..., None]).round_().view(outputs, inputs)
    if scheme.kind == "int8":
        return codes.clamp_(-128, 127).to(torch.int8), scales
    nibbles = codes.clamp_(-8, 7).add_(8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scales


def whole(codes: Tensor, scales: Tensor) -> Tensor:
    """(O, I) weights of the type of ``scales``."""
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8).sub_(8)
    outputs, inputs = codes.shape
    rows = codes.to(scales.dtype).view(outputs, scales.shape[1], -1)
    return rows.mul_(scales[..., None]).view(outputs, inputs)


Placed = Callable[[nn.Module, str], None]
"""Told of each tensor of a module that has just got its values, by name."""


@dataclass(frozen=True)
class Quantizer:
    """The linears of the part called ``part`` to quantise: shell patterns over ``part.name``."""

    part: str
    scheme: Scheme
    patterns: Sequence[str]

    def takes(self, name: str) -> bool:
        """True if the linear ``name`` of the part is meant."""
        return any(fnmatchcase(f"{self.part}.{name}", pattern) for pattern in self.patterns)

    def placed(self, module: nn.Module, tensor: str) -> None:
        """Quantise the linear whose weight is the ``tensor`` of ``module`` that has just been read.

        So that of a whole part never more than one tensor is there in full.
        """
        if self.replaces(module, tensor):
            self._replace(module, tensor.rpartition(".")[0])

    def replaces(self, module: nn.Module, tensor: str) -> bool:
        """True if ``tensor`` is the weight of a linear to quantise."""
        path, _, local = tensor.rpartition(".")
        return local == "weight" and self.takes(path) and _plain(module.get_submodule(path))

    def __call__(self, module: nn.Module) -> int:
        """Quantise all of ``module``; returns the number of its quantised linears."""
        for path in list(self.wanted(module)):
            self._replace(module, path)
        return sum(isinstance(layer, QuantizedLinear) for layer in module.modules())

    def wanted(self, module: nn.Module) -> Iterator[str]:
        """Names of the plain linears of ``module`` that are meant."""
        return (name for name, layer in module.named_modules() if _plain(layer) and self.takes(name))

    def _replace(self, module: nn.Module, path: str) -> None:
        linear = cast(nn.Linear, module.get_submodule(path))
        parent, _, leaf = path.rpartition(".")
        layer = QuantizedLinear(linear, self.scheme).train(linear.training)
        setattr(module.get_submodule(parent), leaf, layer)


def _plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """(name, layer) of every quantised linear."""
    for name, layer in module.named_modules():
        if isinstance(layer, QuantizedLinear):
            yield name, layer

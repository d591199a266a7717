"""An adapter's layers as data, and the arithmetic of low-rank changes of a weight; no module is touched.

Letters: r rank, I inputs, O outputs of a linear, or channels of a convolution, whose weight is (O, I, k, k).
A fused linear (q, k, v in one) has P parts of O / P rows each, and factors of its own for every part.

Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353; LoKr, and factors of a convolution (LoCon),
arXiv:2309.14859, section 3.2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sat.errors import UserError


class AdapterError(UserError, ValueError):
    """An adapter that does not fit the model, or a file that holds none. One line a user can act on."""


@dataclass(frozen=True)
class Pair:
    """The low-rank change of one part: ``alpha`` / r * ``up`` @ ``down``, at each point of a convolution.

    ``kron``: the Kronecker factors that the pair is made of, of a LoKr; they change together.
    """

    down: Tensor  # (r, I), of a convolution (r, I, k, k)
    up: Tensor  # (O / P, r)
    alpha: float
    kron: Kron | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """Factor on the product of ``up`` and ``down``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LayerFactors:
    """One linear's share of an adapter: a pair for each part, or None for a part that stays as it is.

    ``magnitude`` (O,), of DoRA: the norms that the rows of the changed weight are brought to.
    """

    parts: tuple[Pair | None, ...]
    magnitude: Tensor | None = None

    @property
    def inputs(self) -> int:
        """I."""
        return next(pair.down.shape[1] for pair in self.parts if pair is not None)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Points of a convolution's kernel, high and wide; (1, 1) of a linear."""
        return next(tuple(pair.down.shape[2:]) or (1, 1) for pair in self.parts if pair is not None)

    @property
    def kron(self) -> bool:
        """True if it is a LoKr's."""
        return any(pair is not None and pair.kron is not None for pair in self.parts)

    @property
    def part_outputs(self) -> int:
        """O / P."""
        return next(pair.up.shape[0] for pair in self.parts if pair is not None)


@dataclass(frozen=True)
class Kron:
    """``w1`` (x) ``a`` ``b``: w1 (o1, i1), a (o2, r), b (r, i2). Without ``b``: w1 (x) ``a``, a (o2, i2).

    As (w1 (x) a) (1 (x) b) it is a low-rank product of rank i1 r, which is attached, merged and converted
    like every other. ``rank``: of the products in the file; None: no piece was one.
    """

    w1: Tensor
    a: Tensor
    b: Tensor | None
    rank: int | None

    def pair(self, scale: float) -> Pair:
        """The low-rank form of ``scale`` times the product."""
        a, b = self.a, self.b
        if b is None:
            rows, columns = a.shape
            a, b = (a, _eye(columns, a)) if columns <= rows else (_eye(rows, a), a)
        down = torch.kron(_eye(self.w1.shape[1], b), b)  # (i1 r, I): 1 (x) b
        return Pair(down, torch.kron(self.w1, a), scale * down.shape[0], self)  # up (O, i1 r): w1 (x) a


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


Layers = Mapping[str, LayerFactors]
"""An adapter's layers by the linear's name in its model."""


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean norms (O,) of the rows of ``weight`` (O, I) or (O, I, k, k), at least float32."""
    return widened(weight).square().flatten(1).sum(1).sqrt()


def telling(names: Iterable[str]) -> list[str]:
    """Up to four of ``names``, evenly spread: layers whose :func:`some_norms` tell a model's weights."""
    ordered = sorted(names)
    return ordered[:: -(-len(ordered) // 4) or 1]


def some_norms(norms: Tensor) -> list[float]:
    """Up to 16 of the ``norms`` (O,), evenly spread; formats and types of files hardly change them."""
    rows = sorted({round(i * (len(norms) - 1) / 15) for i in range(16)})
    return [float(f"{norm:.6g}") for norm in norms[rows].tolist()]


def weight_change(weight: Tensor, factors: LayerFactors) -> Tensor:
    """Change, of the shape of ``weight``, that an adapter at strength 1 makes to it, at least float32."""
    wide = widened(weight)
    change = torch.zeros_like(wide)
    for rows, pair in zip(change.chunk(len(factors.parts)), factors.parts, strict=True):
        if pair is not None:
            product = pair.up.to(wide) @ pair.down.to(wide).flatten(1)  # (O / P, I) or (O, I k k)
            rows += pair.scale * product.view_as(rows)
    if factors.magnitude is None:
        return change
    changed = wide + change
    norms = row_norms(changed).clamp_min(torch.finfo(wide.dtype).tiny)
    return (factors.magnitude.to(wide) / norms)[:, None] * changed - wide


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def finite_cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in ``dtype``; an error where its finite values do not fit."""
    cast = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    planned = hasattr(tensor, "fake_mode")  # an estimate's: without values
    if narrower and not planned and bool((cast.isinf() & tensor.isfinite()).any()):
        raise AdapterError(
            f"{name!r} with its adapters has values beyond the range of {str(dtype)[6:]}: use bf16 or "
            f"fp32, or less strength"
        )
    return cast


class LinearLike(Protocol):
    """A linear that an adapter can wrap: nn.Linear, or its sharded and quantised versions."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int


def shape(layer: object) -> tuple[int, ...]:
    """(O, I) of a linear, (O, I, k, k) of a convolution, with adapters or without."""
    layer = getattr(layer, "base", layer)
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)
    linear = cast(LinearLike, layer)
    return linear.out_features, linear.in_features


def fitted(factors: LayerFactors, layer: object) -> LayerFactors:
    """``factors`` of ``layer``; those of a 1 x 1 convolution, as linears in some files, with its points."""
    if len(shape(layer)) == 2 or factors.kernel != (1, 1):
        return factors
    pairs = [
        pair and replace(pair, down=pair.down.view(*pair.down.shape[:2], 1, 1)) for pair in factors.parts
    ]
    return replace(factors, parts=tuple(pairs))


def initial_factors(
    layer: LinearLike | nn.Conv2d,
    ranks: Sequence[int],
    alphas: Sequence[float],
    seed: str,
    norms: Tensor | None = None,
    lokr: int | None = None,
) -> LayerFactors:
    """Factors that change nothing yet: random ``down``, zero ``up``. ``seed`` is any text.

    ``norms`` (O,) of the rows of the base's weight make it DoRA. ``down`` is uniform in +-1 / sqrt(I), of a
    convolution in +-1 / sqrt(I k k).
    ``lokr``: Kronecker factors instead, w1 about that large; w1 is zero, the others as ``down`` is.
    Source: arXiv:2106.09685, section 4.1.
    """
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")
    generator = torch.Generator().manual_seed(number)
    outputs, *inputs = shape(layer)
    bound = 1 / math.sqrt(math.prod(inputs))
    rows = outputs // len(ranks)
    pairs = []
    for rank, alpha in zip(ranks, alphas, strict=True):
        if lokr is not None:
            pairs.append(_initial_kron(rows, inputs[0], rank, lokr, generator).pair(alpha / rank))
            continue
        down = bound * (2 * torch.rand(rank, *inputs, generator=generator) - 1)  # (r, I) or (r, I, k, k)
        pairs.append(Pair(down, torch.zeros(rows, rank), alpha))
    return LayerFactors(tuple(pairs), norms)


def _initial_kron(outputs: int, inputs: int, rank: int, factor: int, generator: torch.Generator) -> Kron:
    """Factors of a zero (``outputs``, ``inputs``); w2 is whole where ``rank`` is half its size or more."""
    (o1, o2), (i1, i2) = two_factors(outputs, factor), two_factors(inputs, factor)

    def drawn(*shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(shape[1])

    w1 = torch.zeros(o1, i1)
    if rank >= max(o2, i2) / 2:
        return Kron(w1, drawn(o2, i2), None, None)
    return Kron(w1, drawn(o2, rank), drawn(rank, i2), rank)


def two_factors(size: int, factor: int) -> tuple[int, int]:
    """(m, n), m n = ``size``: m is ``factor`` if that divides it, else the largest divisor up to it.

    m is at most the root then; ``factor`` -1: the largest such. Source: LyCORIS and PEFT.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    m = next(m for m in range(most, 0, -1) if size % m == 0)
    return m, size // m

"""An adapter's layers as data, and the arithmetic of low-rank changes of a weight; no module is touched.

Letters: r rank, I inputs, O outputs of a linear. A fused linear (q, k, v in one) has P parts of O / P rows
each, and factors of its own for every part.

Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sat.errors import UserError


class AdapterError(UserError, ValueError):
    """An adapter that does not fit the model, or a file that holds none. One line a user can act on."""


@dataclass(frozen=True)
class Pair:
    """The low-rank change of one part: ``alpha`` / r * ``up`` @ ``down``."""

    down: Tensor  # (r, I)
    up: Tensor  # (O / P, r)
    alpha: float

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
    def part_outputs(self) -> int:
        """O / P."""
        return next(pair.up.shape[0] for pair in self.parts if pair is not None)


Layers = Mapping[str, LayerFactors]
"""An adapter's layers by the linear's name in its model."""


def row_norms(weight: Tensor) -> Tensor:
    """Euclidean norms (O,) of the rows of ``weight`` (O, I), at least float32."""
    return widened(weight).square().sum(1).sqrt()


def weight_change(weight: Tensor, factors: LayerFactors) -> Tensor:
    """Change (O, I) that an adapter at strength 1 makes to ``weight``, at least float32."""
    wide = widened(weight)
    change = torch.zeros_like(wide)
    for rows, pair in zip(change.chunk(len(factors.parts)), factors.parts, strict=True):
        if pair is not None:
            rows += pair.scale * (pair.up.to(wide) @ pair.down.to(wide))
    if factors.magnitude is None:
        return change
    changed = wide + change
    norms = row_norms(changed).clamp_min(torch.finfo(wide.dtype).tiny)
    return (factors.magnitude.to(wide) / norms)[:, None] * changed - wide


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class LinearLike(Protocol):
    """A linear that an adapter can wrap: nn.Linear, or its sharded and quantised versions."""

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int


def initial_factors(
    linear: LinearLike, ranks: Sequence[int], alphas: Sequence[float], seed: str, norms: Tensor | None = None
) -> LayerFactors:
    """Factors that change nothing yet: random ``down``, zero ``up``. ``seed`` is any text.

    ``norms`` (O,) of the rows of the base's weight make it DoRA. ``down`` is uniform in +-1 / sqrt(I).
    Source: arXiv:2106.09685, section 4.1.
    """
    number = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")
    generator = torch.Generator().manual_seed(number)
    bound = 1 / math.sqrt(linear.in_features)
    rows = linear.out_features // len(ranks)
    pairs = []
    for rank, alpha in zip(ranks, alphas, strict=True):
        down = bound * (2 * torch.rand(rank, linear.in_features, generator=generator) - 1)  # (r, I)
        pairs.append(Pair(down, torch.zeros(rows, rank), alpha))
    return LayerFactors(tuple(pairs), norms)

"""Sharding of a model's layers over tensor-parallel ranks, as data.

A model declares a :data:`Sharding`; nothing here knows about process groups, and no model imports them. A
:class:`Shard` is one rank's share of a tensor; a layer that is split implements :class:`Splits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Column:
    """Each rank holds a share of the output rows; ``parts`` fused projections (3 for qkv) are each split.

    ``unit`` names the attribute, of the layer around the linear, with the number of outputs that stay
    together: the size of an attention head. None: outputs are split one by one. ``gather``: the outputs are
    joined again on every rank, so that the next layer need not know; for large weights that are used seldom.
    """

    parts: int = 1
    unit: str | None = None
    gather: bool = False


@dataclass(frozen=True)
class Row:
    """Each rank holds a share of the input columns; outputs are summed over ranks and the bias added once.

    ``unit`` as in :class:`Column`, of inputs.
    """

    unit: str | None = None


Sharding = Mapping[str, Column | Row]
"""Module-name pattern (``fnmatch``: ``transformer.blocks.*.attn.qkv``) -> style."""


def style_of(sharding: Sharding, name: str) -> Column | Row | None:
    """Style of the module ``name``: that of the first pattern that matches."""
    return next((style for pattern, style in sharding.items() if fnmatchcase(name, pattern)), None)


def family_sharding(kind: type[nn.Module]) -> Sharding:
    """Sharding of a model class: ``SHARDING`` in ``keys.py`` beside its module, with what is fused."""
    package = kind.__module__.rpartition(".")[0]
    if not package or find_spec(f"{package}.keys") is None:
        return {}
    sharding: Sharding = getattr(import_module(f"{package}.keys"), "SHARDING", {})
    return sharding


def of_factors(style: Column | Row | None) -> tuple[Column | Row | None, Column | Row | None]:
    """Styles of the low-rank factors (down, up) of a linear of ``style``; None: whole on every rank.

    Column: ``down`` is whole and each rank holds its rows of ``up``. Row: each rank holds its columns of
    ``down``, the small outputs are summed, and ``up`` is whole. Each fused part has factors of its own, so
    its ``up`` is an unfused column.
    """
    if isinstance(style, Column):
        return None, Column()
    return None if style is None else Row(), None


# -- shares of tensors


@dataclass(frozen=True)
class Cut:
    """Dimension along which a tensor is cut; each of its ``parts`` fused parts is cut by itself."""

    dim: int
    parts: int = 1

    def share(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Share of ``rank`` of ``size``: a view where it can be one."""
        if self.parts == 1:
            return whole.chunk(size, self.dim)[rank]
        pieces = [part.chunk(size, self.dim)[rank] for part in whole.chunk(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """Whole tensor from all ranks' ``shares``, in rank order."""
        if self.parts == 1:
            return torch.cat(list(shares), self.dim)
        split = [share.chunk(self.parts, self.dim) for share in shares]
        return torch.cat([piece for part in zip(*split, strict=True) for piece in part], self.dim)

    def whole(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Shape of the whole tensor, from the ``shape`` of one of ``size`` shares."""
        return tuple(n * size if d == self.dim else n for d, n in enumerate(shape))

    def part(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Shape of one of ``size`` shares, from the ``shape`` of the whole tensor."""
        return tuple(n // size if d == self.dim else n for d, n in enumerate(shape))


@dataclass(frozen=True)
class Shard:
    """Share number ``rank`` of ``size`` of a tensor."""

    cut: Cut
    rank: int
    size: int

    def take(self, whole: Tensor) -> Tensor:
        """This rank's share of ``whole``."""
        return self.cut.share(whole, self.rank, self.size)

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole tensor, from this share's."""
        return self.cut.whole(shape, self.size)


@runtime_checkable
class Splits(Protocol):
    """A layer that holds shares of some of its tensors."""

    def shards(self) -> Mapping[str, Shard]:
        """Shares by local name; tensors that are not named are whole."""
        ...


def cuts(style: Column | Row, kind: type[nn.Module] = nn.Linear) -> dict[str, Cut]:
    """Cuts of the tensors of a layer of ``kind``, by local name.

    An embedding's outputs are its columns; a row linear's bias is whole.
    """
    if issubclass(kind, nn.Embedding):
        if isinstance(style, Row):
            raise ValueError("an embedding is split over its outputs: its sharding must say Column, not Row")
        return {"weight": Cut(1, style.parts)}
    if isinstance(style, Column):
        return {"weight": Cut(0, style.parts), "bias": Cut(0, style.parts)}
    return {"weight": Cut(1)}


def named_cuts(names: Iterable[str], sharding: Sharding) -> dict[str, Cut]:
    """Cuts of the tensors ``names`` of whole linears; those that ``sharding`` does not name stay whole."""
    found: dict[str, Cut] = {}
    for name in names:
        path, _, local = name.rpartition(".")
        style = style_of(sharding, path)
        if style is not None and (cut := cuts(style).get(local)) is not None:
            found[name] = cut
    return found

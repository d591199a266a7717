"""How the layers of a model may be split over tensor-parallel ranks, as data.

A model declares a :data:`Sharding`; nothing here knows about process groups, and no model imports them. What
a rank holds of one tensor is a :class:`Shard`; a layer that is split says so by :class:`Splits`.
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

    ``unit`` names the attribute of the layer around the linear that says how many outputs stay together: the
    size of an attention head. None: each output may go its own way. ``gather``: the outputs are put together
    again on every rank, so that what follows need not know; for weights that are large and used seldom.
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
    """The style of the module ``name``: of the first pattern that matches it."""
    return next((style for pattern, style in sharding.items() if fnmatchcase(name, pattern)), None)


def family_sharding(kind: type[nn.Module]) -> Sharding:
    """Sharding of a model class: ``SHARDING`` in ``keys.py`` beside its module, with what is fused."""
    package = kind.__module__.rpartition(".")[0]
    if not package or find_spec(f"{package}.keys") is None:
        return {}
    sharding: Sharding = getattr(import_module(f"{package}.keys"), "SHARDING", {})
    return sharding


def of_factors(style: Column | Row | None) -> tuple[Column | Row | None, Column | Row | None]:
    """How the low-rank factors (down, up) of a linear of ``style`` are split; None: whole on every rank.

    Column: ``down`` is whole and each rank holds its rows of ``up``; row: each rank holds its columns of
    ``down``, whose small outputs are summed, and ``up`` is whole. Each fused part has factors of its own, so
    its ``up`` is an unfused column.
    """
    if isinstance(style, Column):
        return None, Column()
    return None if style is None else Row(), None


# -- shares of tensors


@dataclass(frozen=True)
class Cut:
    """Along which dimension a tensor is cut, and of how many fused parts, each cut by itself, it consists."""

    dim: int
    parts: int = 1

    def share(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What ``rank`` of ``size`` holds of ``whole``: a view where it can be one."""
        if self.parts == 1:
            return whole.chunk(size, self.dim)[rank]
        pieces = [part.chunk(size, self.dim)[rank] for part in whole.chunk(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """The whole tensor of all ranks' ``shares``, in rank order."""
        if self.parts == 1:
            return torch.cat(list(shares), self.dim)
        split = [share.chunk(self.parts, self.dim) for share in shares]
        return torch.cat([piece for part in zip(*split, strict=True) for piece in part], self.dim)

    def whole(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """The shape of the tensor of which one of ``size`` ranks holds ``shape``."""
        return tuple(n * size if d == self.dim else n for d, n in enumerate(shape))

    def part(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """The shape that one of ``size`` ranks holds of a tensor of ``shape``."""
        return tuple(n // size if d == self.dim else n for d, n in enumerate(shape))


@dataclass(frozen=True)
class Shard:
    """A rank's share of a tensor, as one of ``size``."""

    cut: Cut
    rank: int
    size: int

    def take(self, whole: Tensor) -> Tensor:
        """This rank's share of ``whole``."""
        return self.cut.share(whole, self.rank, self.size)

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The whole tensor's shape, from this share's."""
        return self.cut.whole(shape, self.size)


@runtime_checkable
class Splits(Protocol):
    """A layer that holds shares of some of its tensors."""

    def shards(self) -> Mapping[str, Shard]:
        """By local name; a tensor that is not named is whole."""
        ...


def shards(module: nn.Module) -> dict[str, Shard]:
    """What ``module`` holds only a share of, by full name."""
    return {
        f"{path}.{name}" if path else name: shard
        for path, layer in module.named_modules()
        if isinstance(layer, Splits)
        for name, shard in layer.shards().items()
    }


def cuts(style: Column | Row, kind: type[nn.Module] = nn.Linear) -> dict[str, Cut]:
    """How the tensors of a layer of ``kind`` are cut, by local name.

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

"""How the linear layers of a model may be split over tensor-parallel ranks, as data.

A model declares a :data:`Plan`; nothing here knows about process groups, and no model imports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """Each rank holds a share of the output rows; ``parts`` fused projections (3 for qkv) are each split."""

    parts: int = 1


@dataclass(frozen=True)
class Row:
    """Each rank holds a share of the input columns; outputs are summed over ranks and the bias added once."""


Plan = Mapping[str, Column | Row]
"""Module-name pattern (``fnmatch``: ``transformer.blocks.*.attn.qkv``) -> style."""


def of_factors(style: Column | Row | None) -> tuple[Column | Row | None, Column | Row | None]:
    """How the low-rank factors (down, up) of a linear of ``style`` are split; None: whole on every rank.

    Column: ``down`` is whole and each rank holds its rows of ``up``; row: each rank holds its columns of
    ``down``, whose small outputs are summed, and ``up`` is whole. Each fused part has factors of its own, so
    its ``up`` is an unfused column.
    """
    if isinstance(style, Column):
        return None, Column()
    return style, None

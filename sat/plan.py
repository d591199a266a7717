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

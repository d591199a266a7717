"""Small additions to linear layers, trained and loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from sat.adapters import groups
from sat.config.schema.base import Broken, MustExist, Section


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank factors to train instead of the weights (docs/lora.md).

    ``alpha`` is for layers of ``rank`` (null: equal to it, so that the factors count as they are); layers
    that ``ranks`` gives another rank keep the ratio. ``targets`` are groups of layers
    (``sat/adapters/groups.py``) or shell patterns over ``model.…`` and ``text.…``. ``start`` is an adapter to
    go on from.
    """

    section = "adapters.lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["attention"])
    ranks: dict[str, int] = field(default_factory=dict)
    dora: bool = False
    start: Annotated[Path | None, MustExist("name an adapter to go on from, or null for a new one")] = None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def _rules(self) -> Broken:
        yield from self._at_least_1("rank")
        if self.alpha is not None and not self.alpha > 0:
            yield "alpha", f"expected more than 0, or null for the rank, got {self.alpha}"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"expected a share of 0 to below 1, got {self.dropout}"
        if not self.targets:
            yield "targets", f"expected at least one of {', '.join(groups.GROUPS)}, or a pattern"
        for name in ("targets", "ranks"):
            for target in groups.unknown(getattr(self, name)):
                near = groups.hint(target, groups.GROUPS)
                yield name, f"no group {target!r}{near} (there are {', '.join(groups.GROUPS)}, and patterns)"
        for target, rank in self.ranks.items():
            if rank < 1:
                yield "ranks", f"expected at least 1, got {rank} for {target!r}"


@dataclass(frozen=True)
class LoadConfig(Section):
    """A trained adapter to use; ``strength`` 0 is without it, 1 as trained."""

    section = "adapters.load"
    path: Annotated[Path, MustExist("name an adapter: a file, a folder, or a run's folder")]
    strength: float = 1.0

    def _rules(self) -> Broken:
        if not math.isfinite(self.strength):
            yield "strength", f"expected a number, got {self.strength}"


@dataclass(frozen=True)
class AdaptersConfig(Section):
    """Small additions to linear layers: ``lora`` is trained by ``train.py``, ``load`` used as they are.

    ``merge`` folds the loaded ones into the weights: as fast as without any, but strengths are then fixed.
    """

    section = "adapters"
    lora: LoraConfig | None = None
    load: list[LoadConfig] = field(default_factory=list)
    merge: bool = False

"""Pictures with captions for training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from sat.config.schema.base import Broken, MustExist, Section


@dataclass(frozen=True)
class SourceConfig(Section):
    """One data set: a folder, table or shards of images with captions (``name-{000..012}.tar`` is a range).

    ``repeats``: copies of it in an epoch. ``weight``: its share of the stream instead, relative to the
    weights of the other sources.
    """

    section = "data.sources"
    path: Annotated[
        Path,
        MustExist("name a folder, table or shards of images with captions (see docs/data.md)", ranges=True),
    ]
    repeats: int = 1
    weight: float | None = None

    def _rules(self) -> Broken:
        yield from self._at_least_1("repeats")
        if self.weight is not None and not 0 < self.weight < math.inf:
            yield "weight", f"expected more than 0 or null, got {self.weight}"
        if self.weight is not None and self.repeats != 1:
            yield "weight", f"`repeats` {self.repeats} is given too: one of them says how often it comes"


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Mild random placement on white: ``shift`` is a share of the side, ``scale`` the range of the factor."""

    section = "data.augment"
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def _rules(self) -> Broken:
        if not 0 <= self.shift <= 0.5:
            yield "shift", f"expected 0 to 0.5 of the side, got {self.shift}"
        if not 0 < self.scale[0] <= self.scale[1]:
            yield "scale", f"expected 0 < smallest <= largest, got {list(self.scale)}"


@dataclass(frozen=True)
class BucketsConfig(Section):
    """Sizes for pictures of different shapes: multiples of ``step`` pixels with at most ``area`` pixels.

    ``area``: one or several; a picture goes to the largest that it fills. ``max_ratio``: of the longer to
    the shorter side. ``min_images``: buckets with fewer are closed, their pictures go to the next best.
    """

    section = "data.buckets"
    area: int | list[int]
    step: int
    max_ratio: float = 2.0
    min_images: int = 1

    @property
    def areas(self) -> tuple[int, ...]:
        """All areas in pixels."""
        return (self.area,) if isinstance(self.area, int) else tuple(self.area)

    def _rules(self) -> Broken:
        yield from self._at_least_1("step", "min_images")
        if not self.areas or min(self.areas) < self.step**2:
            least = f"at least `step` x `step` ({self.step**2}) pixels"
            yield "area", f"expected one or several areas of {least}, got {self.area}"
        if not 1 <= self.max_ratio < math.inf:
            yield "max_ratio", f"expected at least 1, got {self.max_ratio}"


@dataclass(frozen=True)
class DataConfig(Section):
    """Image-caption pairs for training, brought to ``height`` x ``width`` pixels or to ``buckets``.

    ``cache``: a folder that keeps latents and text embeddings over runs; ``cache_views``: differently placed
    pictures of each item whose latents are kept there, or in memory without it.
    """

    section = "data"
    sources: list[SourceConfig]
    height: int | None = None
    width: int | None = None
    buckets: BucketsConfig | None = None
    crop: Literal["center", "random"] = "center"
    augment: AugmentConfig | None = None
    max_bad_share: float = 0.05
    cache: Path | None = None
    cache_views: int = 0
    workers: int = 0
    validation: list[SourceConfig] = field(default_factory=list)

    def _rules(self) -> Broken:
        if not self.sources:
            yield "sources", "expected at least one source"
        for name in ("sources", "validation"):
            weighted = [source.weight is not None for source in getattr(self, name)]
            if any(weighted) and not all(weighted):
                yield name, "either every source has a `weight` or none has"
        yield from self._size_rules()
        if not 0 <= self.max_bad_share <= 1:
            yield "max_bad_share", f"expected a share of 0 to 1, got {self.max_bad_share}"
        for name in ("cache_views", "workers"):
            if getattr(self, name) < 0:
                yield name, f"expected at least 0, got {getattr(self, name)}"

    def _size_rules(self) -> Broken:
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is None and self.buckets is None:
                yield "", f"needs `{name}`, or `buckets` instead of height and width"
            elif value is not None and self.buckets is not None:
                yield name, "`buckets` is given too: set one of them to null"
            elif value is not None and value < 1:
                yield name, f"expected at least 1 pixel, got {value}"

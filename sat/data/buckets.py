"""Aspect-ratio buckets: the sizes that pictures are trained at, and the bucket of each picture.

Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from sat.data.records import BadRecord, DataError, Record, RecordSet, check_bad_share
from sat.util.pictures import check_shape, open_picture

Size = tuple[int, int]
LEAST_AREA = 0.9  # share of an area that sizes at the ratio's limit must have
ORIENTATION = 0x0112  # EXIF tag; from 5 on the picture lies on its side


@dataclass(frozen=True)
class BucketRule:
    """Rule of the sizes: multiples of ``step`` with at most each of ``areas`` pixels.

    No size is longer than ``max_ratio`` times its width, nor the other way round. Buckets of fewer than
    ``min_images`` pictures are closed and their pictures go to the next best.
    """

    areas: tuple[int, ...]
    step: int
    max_ratio: float = 2.0
    min_images: int = 1

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"data.buckets.step {self.step}: expected at least 1 pixel")
        if not self.max_ratio >= 1:
            raise ValueError(f"data.buckets.max_ratio {self.max_ratio}: expected at least 1")
        if not self.areas or min(self.areas) < self.step**2:
            raise ValueError(
                f"data.buckets.area {list(self.areas)}: expected at least step x step = {self.step**2} pixels"
            )

    def sizes(self, area: int) -> list[Size]:
        """The sizes of one area, tall ones first: the square, and to each shorter side the longest that fits.

        Where ``max_ratio`` makes that side shorter, the size still has to have most of the area.
        """
        side = math.isqrt(area) // self.step * self.step
        found = {(side, side)}
        for short in range(self.step, side + 1, self.step):
            fits = area // short // self.step * self.step
            long = min(fits, int(self.max_ratio * short) // self.step * self.step)
            if long == fits or short * long >= LEAST_AREA * area:
                found |= {(long, short), (short, long)}
        return sorted(found, key=lambda size: (-size[0] / size[1], -size[0]))

    def area(self, size: Size) -> int:
        """The largest of the areas that a picture fills without being enlarged, else the smallest."""
        return max((area for area in self.areas if area <= size[0] * size[1]), default=min(self.areas))

    def best(self, size: Size) -> Size:
        """The bucket of a picture: of its area, the nearest ratio, and the largest of equals."""
        return nearest(size, self.sizes(self.area(size)))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The one of ``sizes`` with the ratio nearest to that of ``size``, and the largest of equals."""
    wanted = math.log(size[0] / size[1])
    return min(sizes, key=lambda one: (round(abs(math.log(one[0] / one[1]) - wanted), 9), -one[0] * one[1]))


@dataclass(frozen=True)
class Buckets:
    """The buckets in use, and the items of each in ascending order."""

    sizes: tuple[Size, ...]
    items: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pictures: Sequence[Size], rule: BucketRule) -> Buckets:
        """The buckets of pictures whose files have the given sizes, largest area and tallest first."""
        tables = {area: rule.sizes(area) for area in rule.areas}
        groups: dict[Size, list[int]] = {}
        for index, size in enumerate(pictures):
            groups.setdefault(nearest(size, tables[rule.area(size)]), []).append(index)
        while len(groups) > 1:
            least = min(groups, key=lambda size: (len(groups[size]), size))
            if len(groups[least]) >= rule.min_images:
                break
            for index in groups.pop(least):
                groups[nearest(pictures[index], sorted(groups))].append(index)
        order = sorted(groups, key=lambda size: (-size[0] * size[1] // rule.step**2, -size[0]))
        return cls(tuple(order), tuple(tuple(sorted(groups[size])) for size in order))


def measure(record: Record) -> Size:
    """(height, width) of a picture as it is shown, out of the head of its file."""
    with open_picture(record.file()) as picture:
        check_shape((picture.height, picture.width))
        sideways = False
        if picture.format != "PNG" or "exif" in picture.info:  # a PNG without would be decoded to look for it
            sideways = picture.getexif().get(ORIENTATION, 1) >= 5
        return (picture.width, picture.height) if sideways else (picture.height, picture.width)


def measure_all(records: Sequence[Record], workers: int = 8) -> list[Size | BadRecord]:
    """(height, width) of every picture, or the reason that it cannot be measured."""

    def measure_one(record: Record) -> Size | BadRecord:
        try:
            return measure(record)
        except (OSError, ValueError) as error:
            return BadRecord(record.name, str(error), "picture")

    with ThreadPoolExecutor(workers, thread_name_prefix="measure") as pool:
        return list(pool.map(measure_one, records))


def measured(
    records: RecordSet, seen: Sequence[Size | BadRecord], max_bad_share: float = 0.05
) -> tuple[RecordSet, list[Size]]:
    """The records whose pictures could be measured, and their sizes; the others are among its bad ones.

    ``seen`` is the result of ``measure_all`` for the records.
    """
    bad = list(dict.fromkeys(one for one in seen if isinstance(one, BadRecord)))
    check_bad_share(bad, len(records), max_bad_share, "data")
    kept = [(r, one) for r, one in zip(records.records, seen, strict=True) if not isinstance(one, BadRecord)]
    if not kept:
        raise DataError("no picture of the data set can be read")
    shares, start = [], 0  # with the number of readable records of each source
    for count, weight in records.shares:
        left = sum(not isinstance(one, BadRecord) for one in seen[start : start + count])
        if not left:
            raise DataError("no picture of one of data.sources can be read")
        shares.append((left, weight))
        start += count
    every = (*records.bad, *bad)
    found = replace(records, records=tuple(r for r, _ in kept), bad=every, shares=tuple(shares))
    return found, [size for _, size in kept]

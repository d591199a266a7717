"""Surveys of data sources: counts, sizes, captions, buckets, duplicates, errors."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from sat.data.buckets import ORIENTATION, Buckets, Size
from sat.data.records import (
    HELD_OUT,
    IMAGE_SUFFIXES,
    LISTED,
    NO_EXTRAS,
    BadRecord,
    ExtraRule,
    Record,
    note,
    skipped,
)
from sat.data.sources import TABLES, files_below, read_source
from sat.data.transforms import Transform
from sat.data.transforms import opened as with_extras
from sat.util.log import one_line
from sat.util.pictures import open_picture, shown

SHOWN = 5  # lines of a list that is printed


class Picture(NamedTuple):
    """Properties of an opened picture. ``size`` is (height, width) as shown."""

    size: Size
    kind: str  # of the file: PNG, JPEG …
    mode: str  # of its pixels: RGB, P, CMYK …
    turned: bool  # by its EXIF
    several: bool  # frames or pages, of which the first is used
    file: str  # digest of the file
    pixels: str  # digest of size and pixels, transparency on white


@dataclass(frozen=True)
class Survey:
    """Counts over one source."""

    source: Path
    readable: tuple[Record, ...]
    pictures: tuple[Picture, ...]  # of the readable ones
    bad: tuple[BadRecord, ...]
    labels: dict[str, Counter[str]]  # by field of the table, e.g. style
    too_long: tuple[str, ...] = ()  # captions over the token limit
    captions: int = 0
    words: tuple[int, ...] = field(default=())  # in each caption
    notes: tuple[str, ...] = ()

    def lines(
        self, height: int | None = None, width: int | None = None, most: int | None = LISTED
    ) -> list[str]:
        """The survey in words, ``most`` skipped ones; with a training size, the smaller pictures too."""
        found = skipped(self.bad, most)
        sizes = Counter(f"{picture.size[0]}x{picture.size[1]}" for picture in self.pictures)
        rows = [
            f"{self.source}: {len(self.readable)} pairs, {found[0]}",
            f"formats: {_counts(Counter(picture.kind for picture in self.pictures))}",
            f"sizes (height x width): {_counts(sizes)}",
        ]
        modes = Counter(picture.mode for picture in self.pictures if picture.mode != "RGB")
        if modes:
            rows.append(f"converted to RGB, transparent parts to white: {_counts(modes)}")
        if turned := sum(picture.turned for picture in self.pictures):
            rows.append(f"turned as their EXIF says: {turned}")
        if several := sum(picture.several for picture in self.pictures):
            rows.append(f"with several frames or pages, of which the first is used: {several}")
        if self.words:
            middle = sorted(self.words)[len(self.words) // 2]
            rows.append(
                f"captions: {self.captions}, {min(self.words)} to {max(self.words)} words, median {middle}"
            )
        if height is not None and width is not None:
            small = sum(one.size[0] < height or one.size[1] < width for one in self.pictures)
            rows.append(f"smaller than {height}x{width}, so enlarged: {small}")
        extras = Counter(name for record in self.readable for name in record.extras)
        rows += [f"with a {name}: {count}" for name, count in extras.items()]
        rows += [
            f"{name}: {len(values)} different, {_counts(values)}" for name, values in self.labels.items()
        ]
        if self.too_long:
            rows.append(f"captions over the token limit: {len(self.too_long)}")
            rows += [f"over the token limit: {caption!r}" for caption in self.too_long[:SHOWN]]
        return [*rows, *self.notes, *found[1:]]


def survey(
    source: Path,
    too_long: Callable[[str], bool] | None = None,
    workers: int = 4,
    caption: str | Mapping[str, float] | None = None,
    extras: Mapping[str, ExtraRule] = NO_EXTRAS,
) -> Survey:
    """Opens every picture of ``source`` once; ``too_long`` tells if a caption is over the token limit.

    ``caption`` and ``extras``: as of :func:`sat.data.sources.read_source`.
    """
    found = read_source(source, caption, extras)
    unnamed = list[Path]()
    if any((source / name).is_file() for name in TABLES):  # which stand for the folder
        kept = source / HELD_OUT
        rows = [*found.records, *(read_source(kept).records if kept.is_file() else ())]
        named = {os.path.normpath(record.path) for record in rows}
        pictures = (file for file in files_below(source) if file.suffix.lower() in IMAGE_SUFFIXES)
        unnamed = [file for file in pictures if os.path.normpath(file) not in named]
    with ThreadPoolExecutor(workers, thread_name_prefix="survey") as pool:
        seen = list(pool.map(inspect_picture, found.records))
    bad = [one for one in seen if isinstance(one, BadRecord)]
    readable = tuple(r for r, one in zip(found.records, seen, strict=True) if not isinstance(one, BadRecord))
    labels: dict[str, Counter[str]] = {}
    for record in readable:
        for name, value in record.labels.items():
            labels.setdefault(name, Counter())[value] += 1
    captions = [caption for record in readable for caption in record.captions]
    long = () if too_long is None else tuple(caption for caption in captions if too_long(caption))
    return Survey(
        source,
        readable,
        tuple(one for one in seen if not isinstance(one, BadRecord)),
        (*found.bad, *bad),
        labels,
        long,
        len(captions),
        tuple(len(caption.split()) for caption in captions),
        (*found.notes, *note("pictures that no usable row names", unnamed)),
    )


def inspect_picture(record: Record) -> Picture | BadRecord:
    """Properties of a picture, or the reason that it cannot be opened."""
    try:
        source, digest = record.file(), hashlib.sha256()
        with open_picture(source) as opened:
            kind, mode = opened.format or "?", opened.mode
            several = bool(getattr(opened, "is_animated", False))
            turned = opened.getexif().get(ORIENTATION, 1) in range(2, 9)
            picture = shown(opened)
        if record.extras:
            with_extras(record)
        with source.open("rb") if isinstance(source, Path) else source as file:
            file.seek(0)
            while part := file.read(1 << 20):
                digest.update(part)
    except (OSError, ValueError) as error:
        return BadRecord(record.name, str(error), "picture")
    size = (picture.height, picture.width)
    pixels = hashlib.sha256(f"{size}".encode())
    pixels.update(picture.tobytes())
    return Picture(size, kind, mode, turned, several, digest.hexdigest(), pixels.hexdigest())


def duplicates(surveys: Sequence[Survey]) -> list[str]:
    """The identical files, and the files with identical pictures, of all sources; a line for each group."""
    pairs = [(r.name, p) for one in surveys for r, p in zip(one.readable, one.pictures, strict=True)]
    files, pixels = _same((p.file, name) for name, p in pairs), _same((p.pixels, name) for name, p in pairs)
    known = {frozenset(names) for names in files}
    again = [names for names in pixels if frozenset(names) not in known]
    rows = []
    for what, found in (("identical files", files), ("identical pictures in different files", again)):
        if found:
            rows.append(f"{what}: {sum(map(len, found)) - len(found)} more than needed")
            for names in found[:SHOWN]:
                others = [f"and {len(names) - 3} others"] if len(names) > 3 else []
                rows.append(one_line(f"{what}: {', '.join([*names[:3], *others])}"))
    places = Counter(place for one in surveys for place in {os.path.realpath(r.name) for r in one.readable})
    return rows + note(
        "pictures that are in several sources", [p for p, count in places.items() if count > 1]
    )


def _same(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The different names of every digest that has several."""
    names: dict[str, list[str]] = {}
    for digest, name in pairs:
        group = names.setdefault(digest, [])
        if name not in group:
            group.append(name)
    return [group for group in names.values() if len(group) > 1]


def bucket_table(buckets: Buckets, batch: int, pictures: Sequence[Size]) -> list[str]:
    """The buckets with their images, and their batches of ``batch`` images (over all ranks) in an epoch.

    ``pictures``: their sizes, for those that are enlarged.
    """
    total = sum(map(len, buckets.items))
    rows = [
        f"{len(buckets.sizes)} bucket{'s' * (len(buckets.sizes) != 1)}, {total} images, batches of {batch}",
        f"{'height x width':>14}  {'ratio':>5}  {'images':>7}  {'share':>6}  {'batches an epoch':>16}",
    ]
    for (height, width), items in zip(buckets.sizes, buckets.items, strict=True):
        note = "  fewer than a batch" if len(items) < batch else ""
        factors = [max(height / pictures[item][0], width / pictures[item][1]) for item in items]
        if enlarged := [factor for factor in factors if factor > 1]:
            note += f"  {len(enlarged)} enlarged, up to {max(enlarged):.1f} times"
        rows.append(
            f"{f'{height} x {width}':>14}  {width / height:5.2f}  {len(items):7d}  "
            f"{len(items) / total:6.1%}  {len(items) / batch:16.2f}{note}"
        )
    return rows


def contact_sheet(records: Sequence[Record], columns: int, height: int, width: int) -> PIL.Image.Image:
    """The pictures as trained on without random placement, in rows of ``columns``, 2 pixels apart."""
    transform = Transform(height, width)
    rows = -(-len(records) // columns)
    out = PIL.Image.new("RGB", (columns * (width + 2) + 2, rows * (height + 2) + 2), "#888888")
    for place, record in enumerate(records):
        pixels = transform.load(record.file()).pixels
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        cut = PIL.Image.fromarray(pixels[top : top + height, left : left + width])
        out.paste(cut, (2 + place % columns * (width + 2), 2 + place // columns * (height + 2)))
    return out


def _counts(counter: Counter[str]) -> str:
    """The most common entries of ``counter``."""
    shown = ", ".join(f"{name} {count}" for name, count in counter.most_common(SHOWN))
    return shown + (f", and {len(counter) - SHOWN} others" if len(counter) > SHOWN else "")

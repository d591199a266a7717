"""What a data source holds: counts, sizes, captions, everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from sat.data.records import Bad, Record
from sat.data.sources import read_source
from sat.data.transforms import Transform, on_white

SHOWN = 5  # lines of a list that is printed


@dataclass(frozen=True)
class Survey:
    """Counts over one source. Sizes are (height, width) pixels of the files."""

    source: Path
    readable: tuple[Record, ...]
    bad: tuple[Bad, ...]
    sizes: Counter[tuple[int, int]]
    formats: Counter[str]
    labels: dict[str, Counter[str]]  # by field of the table, e.g. style
    too_long: tuple[str, ...] = ()  # captions over the token limit
    captions: int = 0
    words: tuple[int, ...] = field(default=())  # in each caption

    def lines(self, height: int | None = None, width: int | None = None) -> list[str]:
        """The survey in words; with a training size, how many pictures are smaller than it."""
        sizes = Counter({f"{h}x{w}": count for (h, w), count in self.sizes.items()})
        rows = [
            f"{self.source}: {len(self.readable)} pairs, {len(self.bad)} that cannot be used",
            f"formats: {_counts(self.formats)}",
            f"sizes (height x width): {_counts(sizes)}",
        ]
        if self.words:
            middle = sorted(self.words)[len(self.words) // 2]
            rows.append(
                f"captions: {self.captions}, {min(self.words)} to {max(self.words)} words, median {middle}"
            )
        if height is not None and width is not None:
            small = sum(n for (h, w), n in self.sizes.items() if h < height or w < width)
            rows.append(f"smaller than {height}x{width}, so enlarged: {small}")
        rows += [
            f"{name}: {len(values)} different, {_counts(values)}" for name, values in self.labels.items()
        ]
        if self.too_long:
            rows.append(f"captions over the token limit: {len(self.too_long)}, e.g. {self.too_long[0]!r}")
        rows += [f"skipped: {bad}" for bad in self.bad[: SHOWN * 4]]
        if len(self.bad) > SHOWN * 4:
            rows.append(f"skipped: and {len(self.bad) - SHOWN * 4} more")
        return rows


def survey(source: Path, too_long: Callable[[str], bool] | None = None) -> Survey:
    """Opens every picture of ``source`` once; ``too_long`` tells if a caption is over the token limit."""
    found = read_source(source)
    bad, readable = list(found.bad), []
    sizes: Counter[tuple[int, int]] = Counter()
    formats: Counter[str] = Counter()
    labels: dict[str, Counter[str]] = {}
    for record in found.records:
        try:
            with PIL.Image.open(record.path) as file:
                kind = file.format or "?"
                picture = on_white(file)
        except Exception as error:  # noqa: BLE001 - decoders raise anything
            bad.append(Bad(str(record.path), f"{type(error).__name__}: {error}"))
            continue
        readable.append(record)
        sizes[picture.height, picture.width] += 1
        formats[kind] += 1
        for name, value in record.labels.items():
            labels.setdefault(name, Counter())[value] += 1
    captions = [caption for record in readable for caption in record.captions]
    long = () if too_long is None else tuple(caption for caption in captions if too_long(caption))
    return Survey(
        source,
        tuple(readable),
        tuple(bad),
        sizes,
        formats,
        labels,
        long,
        len(captions),
        tuple(len(caption.split()) for caption in captions),
    )


def sheet(records: Sequence[Record], columns: int, height: int, width: int) -> PIL.Image.Image:
    """The pictures as trained on without random placement, in rows of ``columns``, 2 pixels apart."""
    transform = Transform(height, width)
    rows = -(-len(records) // columns)
    out = PIL.Image.new("RGB", (columns * (width + 2) + 2, rows * (height + 2) + 2), "#888888")
    for place, record in enumerate(records):
        pixels = transform.load(record.path).pixels
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        cut = PIL.Image.fromarray(pixels[top : top + height, left : left + width])
        out.paste(cut, (2 + place % columns * (width + 2), 2 + place // columns * (height + 2)))
    return out


def _counts(counter: Counter[str]) -> str:
    """The most common entries of ``counter``."""
    shown = ", ".join(f"{name} {count}" for name, count in counter.most_common(SHOWN))
    return shown + (f", and {len(counter) - SHOWN} others" if len(counter) > SHOWN else "")

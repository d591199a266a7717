"""Reading what pairs of pictures and captions a folder holds, without opening the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
CAPTION_KEYS = ("text", "prompt", "caption")
TABLE = "metadata.jsonl"
HELD_OUT = "heldout.jsonl"  # beside it: what is never trained on


class DataError(RuntimeError):
    """The data cannot be used: too much of it is bad, or there is none."""


@dataclass(frozen=True)
class Record:
    """A picture's path, its captions, and how often each of them is drawn."""

    path: Path
    captions: tuple[str, ...]
    weights: tuple[float, ...] = ()  # as many as captions and positive in sum; empty: all alike
    labels: Mapping[str, str] = field(
        default_factory=dict
    )  # other text fields of the table, e.g. concept, style

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("a record needs a caption")
        if self.weights and len(self.weights) != len(self.captions):
            raise ValueError(f"{len(self.weights)} weights for {len(self.captions)} captions")
        if self.weights and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):
            raise ValueError(f"weights {list(self.weights)}: expected none negative and a positive sum")

    def caption(self, draw: float) -> str:
        """The caption that ``draw``, uniform in [0, 1), falls on."""
        if not self.weights:
            return self.captions[int(draw * len(self.captions))]
        left = draw * sum(self.weights)
        for caption, weight in zip(self.captions, self.weights, strict=True):
            left -= weight
            if left < 0:
                return caption
        return next(
            caption for caption, weight in zip(self.captions, self.weights, strict=True) if weight > 0
        )


@dataclass(frozen=True)
class Bad:
    """Something skipped: where it is and what is wrong with it."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class RecordSet:
    """The usable records of a source, in a fixed order, and what was skipped."""

    records: tuple[Record, ...]
    bad: tuple[Bad, ...] = ()

    def __len__(self) -> int:
        return len(self.records)


def read_sources(sources: Sequence[tuple[Path, int]], max_bad_share: float = 0.05) -> RecordSet:
    """The records of all (path, repeats) ``sources``; raises if one has none or too many bad ones."""
    if not sources:
        raise DataError("no data sources (data.sources)")
    records: list[Record] = []
    bad: list[Bad] = []
    for path, repeats in sources:
        found = read_source(path)
        check_bad_share(found.bad, len(found) + len(found.bad), max_bad_share, str(path))
        if not found.records:
            raise DataError(
                f"{path}: no pairs of image and caption; expected {TABLE} with file_name and text, "
                "or images with .txt files of the same name"
            )
        records += found.records * repeats
        bad += found.bad
    return RecordSet(tuple(records), tuple(bad))


def read_source(path: Path) -> RecordSet:
    """The records of one folder or one ``.jsonl`` file.

    A folder with ``metadata.jsonl`` is read through it alone; else every image below it with a ``.txt`` file
    of the same name counts, in order of their paths.
    """
    if path.is_file():
        if path.suffix != ".jsonl":
            raise DataError(f"{path}: expected a folder or a .jsonl file")
        return _read(_rows(path))
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or .jsonl file (data.sources)")
    if (path / TABLE).is_file():
        return _read(_rows(path / TABLE))
    return _read(_pairs(path))


def check_bad_share(bad: Sequence[Bad], total: int, most: float, where: str) -> None:
    """Raises once more than the share ``most`` of ``total`` items is bad, naming the first few."""
    if len(bad) <= most * total:
        return
    shown = "; ".join(str(one) for one in bad[:5]) + ("; …" if len(bad) > 5 else "")
    raise DataError(
        f"{where}: {len(bad)} of {total} items cannot be used, more than the share {most:g} that is put up "
        f"with (data.max_bad_share): {shown}"
    )


def _read(items: Iterator[Record | Bad]) -> RecordSet:
    records: list[Record] = []
    bad: list[Bad] = []
    for item in items:
        if isinstance(item, Bad):
            bad.append(item)
        else:
            records.append(item)
    return RecordSet(tuple(records), tuple(bad))


def _rows(table: Path) -> Iterator[Record | Bad]:
    """One record or complaint for each line of a metadata table."""
    with table.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _row(json.loads(line), table.parent)
            except (ValueError, TypeError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield Bad(f"{table}:{number}", str(error))


def _row(row: object, folder: Path) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with file_name and text, got {type(row).__name__}")
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"file_name is {name!r}, expected the path of an image")
    key = next((key for key in CAPTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{name}: no caption, expected one of {', '.join(CAPTION_KEYS)}")
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    captions = (row[key],) if isinstance(row[key], str) else tuple(row[key])
    if not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        raise ValueError(f"{name}: {key} is {row[key]!r}, expected a caption or a list of captions")
    weights = tuple(float(weight) for weight in row.get("weights") or ())
    labels = {
        str(other): value
        for other, value in row.items()
        if isinstance(value, str) and other not in ("file_name", *CAPTION_KEYS)
    }
    return Record(path, captions, weights, labels)


def _pairs(folder: Path) -> Iterator[Record | Bad]:
    """One record or complaint for each image below ``folder``."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        text = path.with_suffix(".txt")
        try:
            caption = " ".join(text.read_text("utf-8").split())
        except FileNotFoundError:
            yield Bad(str(path), f"no caption file {text.name}")
            continue
        except (OSError, ValueError) as error:
            yield Bad(str(text), str(error))
            continue
        yield Record(path, (caption,)) if caption else Bad(str(text), "empty caption")

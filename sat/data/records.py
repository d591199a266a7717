"""Records, pairs of a picture and its captions wherever the picture lies, and errors in them."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from sat.errors import UserError
from sat.util.log import one_line

IMAGE_SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
    | {".avif", ".jp2", ".j2k", ".jpx"}
)
CAPTION_KEYS = ("text", "prompt", "caption", "captions", "description")
LISTED = 20  # lines of a list of skipped records
TABLE = "metadata.jsonl"
HELD_OUT = "heldout.jsonl"  # beside a table: what is never trained on

Kind = Literal["row", "caption", "picture"]


CONTROL = "control"  # the extra picture that a trained control sees
LOSER = "loser"  # the extra picture that people liked less
MASK = "mask"  # the extra picture that weighs a picture's places; one channel


class DataError(UserError, RuntimeError):
    """The data cannot be used: too much of it is bad, or there is none."""

    exit_code = 1


class DataPathError(DataError):
    """A path that holds no data: the user named the wrong one."""

    exit_code = 2


class Inside(Protocol):
    """Place of a picture in a file that holds many. Its text names it there, e.g. ``0001.jpg``."""

    def open(self, path: Path) -> BytesIO:
        """The picture's bytes out of the file at ``path``."""
        ...


@dataclass(frozen=True)
class PictureFile:
    """A picture's place: a file, or somewhere in one that holds many."""

    path: Path  # of the picture, or of the file that holds it
    inside: Inside | None = field(default=None, kw_only=True)  # where in the file; None: the file itself
    source: Path | None = field(default=None, kw_only=True)  # the folder of the source that has it

    @property
    def name(self) -> str:
        """Path of the picture, for messages; different for different pictures."""
        return str(self.path) if self.inside is None else f"{self.path}:{self.inside}"

    @property
    def place(self) -> str:
        """Path from the name of its source's folder on: the same after that folder was moved."""
        top = self.path.parent if self.source is None else self.source
        place = Path(os.path.relpath(self.path, top.absolute().parent)).as_posix()
        return place if self.inside is None else f"{place}:{self.inside}"

    def file(self) -> Path | BytesIO:
        """The picture as a file to open."""
        return self.path if self.inside is None else self.inside.open(self.path)


@dataclass(frozen=True)
class Record(PictureFile):
    """A picture's place, its captions and their sampling weights, and pictures that belong to it by name.

    ``extras``, such as ``mask``, are cut and placed as the picture is; the picture's own place stands for its
    transparency.
    """

    captions: tuple[str, ...]
    weights: tuple[float, ...] = ()  # as many as captions and positive in sum; empty: all alike
    labels: Mapping[str, str] = field(default_factory=dict)  # other text fields, e.g. concept, style
    loss_weight: float = field(default=1.0, kw_only=True)  # factor of its loss
    extras: Mapping[str, PictureFile] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if not self.captions:
            raise ValueError("a record needs a caption")
        if self.weights and len(self.weights) != len(self.captions):
            raise ValueError(f"{len(self.weights)} weights for {len(self.captions)} captions")
        if self.weights and not (min(self.weights) >= 0 and 0 < sum(self.weights) < math.inf):
            raise ValueError(f"weights {list(self.weights)}: expected none negative and a positive sum")

    def caption(self, draw: float) -> str:
        """The caption that ``draw``, uniform in [0, 1), selects."""
        if not self.weights:
            return self.captions[int(draw * len(self.captions))]
        left = draw * sum(self.weights)
        for caption, weight in zip(self.captions, self.weights, strict=True):
            left -= weight
            if left < 0:
                return caption
        return next(one for one, weight in zip(self.captions, self.weights, strict=True) if weight > 0)


class ExtraRule(NamedTuple):
    """The place of a further picture of every record of a source, by one of the first three.

    ``column``: of a table or parquet file; the ending of a shard's member (``0001.mask.png``) or of a name
    beside the picture (``fox.mask.png``, ``fox-mask.png``). ``folder``: of pictures of the same paths and
    names.
    ``alpha``: the transparency of the picture itself.
    """

    column: str | None = None
    folder: Path | None = None
    alpha: bool = False
    required: bool = True  # a record without it is skipped


NO_EXTRAS: Mapping[str, ExtraRule] = MappingProxyType({})


@dataclass(frozen=True)
class BadRecord:
    """A skipped record: its place (file, line or member) and the reason (field, cause)."""

    where: str
    reason: str
    kind: Kind = "row"

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.reason}")


class FieldError(ValueError):
    """A field of a row that cannot be used; its text is ``field: reason``."""

    def __init__(self, name: str, what: str, kind: Kind = "row") -> None:
        self.kind = kind
        super().__init__(f"{name}: {what}")


@dataclass(frozen=True)
class RecordSet:
    """Usable records in a fixed order, the skipped ones, and notes on what else was found and left out.

    ``shares``: number of records of each source, in order, and its weight in the stream; empty: all records
    weigh the same.
    """

    records: tuple[Record, ...]
    bad: tuple[BadRecord, ...] = ()
    shares: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def told(self) -> list[str]:
        """Lines on what is left out and skipped; none where there is nothing."""
        return [*self.notes, *(skipped(self.bad) if self.bad else ())]


def note(what: str, names: Sequence[object]) -> list[str]:
    """A line on ``names``, the first of them in full; none where there are none."""
    shown = ", ".join(map(str, names[:3])) + (", …" if len(names) > 3 else "")
    return [one_line(f"{len(names)} {what}: {shown}")] if names else []


def skipped(bad: Sequence[BadRecord], most: int | None = LISTED) -> list[str]:
    """The number of skipped records by kind, and a line for each of the first ``most`` (None: all)."""
    names = {"caption": "without caption", "picture": "without readable picture", "row": "broken rows"}
    kinds = Counter[str](one.kind for one in bad)
    found = ", ".join(f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind])
    rows = [f"{len(bad)} that cannot be used" + (f" ({found})" if found else "")]
    rows += [f"skipped: {one}" for one in bad[:most]]
    return rows + ([f"skipped: and {len(bad) - most} more"] if most is not None and len(bad) > most else [])


def check_bad_share(bad: Sequence[BadRecord], total: int, most: float, where: str) -> None:
    """Raises once more than the share ``most`` of ``total`` items is bad, naming the first few."""
    if len(bad) <= most * total:
        return
    shown = "; ".join(str(one) for one in bad[:5]) + ("; …" if len(bad) > 5 else "")
    raise DataError(
        f"{where}: {len(bad)} of {total} items cannot be used, more than the share {most:g} that is put up "
        f"with (data.max_bad_share): {shown}"
    )

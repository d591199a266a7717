"""Parquet tables: pictures as bytes (also Hugging Face's ``image`` column) or as paths, and captions."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat.data.records import CAPTION_KEYS, Bad, DataError, FieldError, Record
from sat.data.tables import row_captions, row_record

if TYPE_CHECKING:
    import pyarrow.parquet

IMAGE = "image"
PATHS = ("file_name", "path")
KEPT = 4  # row groups of pictures in memory, for each file


@dataclass(frozen=True)
class Row:
    """A picture in the ``image`` column."""

    number: int  # of the row in the file, from 1
    group: int
    place: int  # in its row group
    pictures: _Pictures = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"row {self.number}"

    def open(self, path: Path) -> BytesIO:
        """Its bytes."""
        return BytesIO(self.pictures.read(self.group, self.place))


class _Pictures:
    """The ``image`` column of a file: the row groups read last are kept. Safe for several threads."""

    def __init__(self, file: pyarrow.parquet.ParquetFile) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def read(self, group: int, place: int) -> bytes:
        """The bytes of one picture."""
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._file.read_row_group(group, columns=[IMAGE]).column(IMAGE)
                if len(self._groups) > KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            value = self._groups[group][place].as_py()
        found = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(found, bytes):
            raise ValueError(f"{IMAGE}: no bytes in this row")
        return found


def read_parquet(path: Path) -> Iterator[Record | Bad]:
    """One record or complaint for each row; the pictures' bytes are not read yet."""
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow ({error})") from error
    try:
        file = pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield Bad(str(path), f"not a parquet file: {error}")
        return
    columns = file.schema_arrow.names
    wanted = [name for name in (*PATHS, *CAPTION_KEYS, "weights") if name in columns]
    by_bytes = IMAGE in columns
    if not by_bytes and not set(PATHS) & set(columns):
        yield Bad(
            str(path), f"{IMAGE}: no column {IMAGE}, {' or '.join(PATHS)} (there are: {', '.join(columns)})"
        )
        return
    pictures = _Pictures(file)
    number = 0
    for group in range(file.num_row_groups):
        for place, row in enumerate(file.read_row_group(group, columns=wanted).to_pylist()):
            number += 1
            try:
                if by_bytes:
                    found = row_captions(row)
                    inside = Row(number, group, place, pictures)
                    yield Record(path, found.texts, found.weights, inside=inside)
                else:
                    named = next((row[name] for name in PATHS if row.get(name)), None)
                    yield row_record({**row, "file_name": named}, path.parent)
            except FieldError as error:
                yield Bad(f"{path}:row {number}", str(error), error.kind)

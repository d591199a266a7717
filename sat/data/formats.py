"""Records from tables (JSON lines, CSV), parquet files and tar shards."""

from __future__ import annotations

import csv
import itertools
import json
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from sat.data.records import CAPTION_KEYS, IMAGE_SUFFIXES, BadRecord, DataError, FieldError, Record

if TYPE_CHECKING:
    import pyarrow.parquet


class Captions(NamedTuple):
    """The captions of a row, and their sampling weights (empty: alike)."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]


def row_captions(row: Mapping[str, object]) -> Captions:
    """The captions of a row: one text or a list of them under text, prompt or caption, with ``weights``."""
    key = next((key for key in CAPTION_KEYS if row.get(key) is not None), None)
    if key is None:
        raise FieldError(CAPTION_KEYS[0], f"no caption, expected one of {', '.join(CAPTION_KEYS)}", "caption")
    value = row[key]
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise FieldError(key, f"{value!r}, expected a caption or a list of captions", "caption")
    weights = row.get("weights")
    if weights is None:
        return Captions(texts, ())
    if not isinstance(weights, (list, tuple)) or not all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights
    ):
        raise FieldError("weights", f"{weights!r}, expected a list of numbers")
    try:
        Record(Path(), texts, found := tuple(map(float, weights)))
    except ValueError as error:
        raise FieldError("weights", str(error)) from error
    return Captions(texts, found)


def row_record(row: object, folder: Path) -> Record:
    """The record of a row whose ``file_name`` is relative to ``folder``."""
    if not isinstance(row, dict):
        raise FieldError("row", f"expected an object with file_name and text, got {type(row).__name__}")
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        raise FieldError("file_name", f"{name!r}, expected the path of an image", "picture")
    found = row_captions(row)
    path = folder / name
    if not path.is_file():
        raise FieldError("file_name", f"{name}: no such file", "picture")
    labels = {
        str(other): value
        for other, value in row.items()
        if isinstance(value, str) and other not in ("file_name", *CAPTION_KEYS)
    }
    return Record(path, found.texts, found.weights, labels)


def read_jsonl(table: Path) -> Iterator[Record | BadRecord]:
    """One record or complaint for each line of a table of JSON objects."""
    with table.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield row_record(json.loads(line), table.parent)
            except FieldError as error:
                yield BadRecord(f"{table}:{number}", str(error), error.kind)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                yield BadRecord(f"{table}:{number}", f"row: not JSON: {error}")


def read_csv(table: Path) -> Iterator[Record | BadRecord]:
    """One record or complaint for each row of a comma-separated table with a header."""
    with table.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        try:
            columns = rows.fieldnames or []
            for needed in (("file_name",), CAPTION_KEYS):
                if not set(needed) & set(columns):
                    has = ", ".join(map(str, columns)) or "none"
                    yield BadRecord(
                        f"{table}:1", f"{needed[0]}: no column {' or '.join(needed)} (there are: {has})"
                    )
                    return
            for row in rows:
                texts = {key: value for key, value in row.items() if isinstance(value, str) and value.strip()}
                try:
                    yield row_record(texts, table.parent)
                except FieldError as error:
                    yield BadRecord(f"{table}:{rows.line_num}", str(error), error.kind)
        except (csv.Error, ValueError) as error:
            yield BadRecord(
                f"{table}:{rows.line_num + 1}", f"row: not a comma-separated table in UTF-8: {error}"
            )


# -- parquet tables: pictures as bytes (also Hugging Face's ``image`` column) or as paths, and captions


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
        """Bytes of the picture."""
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
                try:
                    self._groups[group] = self._file.read_row_group(group, columns=[IMAGE]).column(IMAGE)
                except Exception as error:  # Arrow's have kinds of their own
                    raise ValueError(f"{IMAGE}: {error}") from error
                if len(self._groups) > KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            value = self._groups[group][place].as_py()
        found = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(found, bytes):
            raise ValueError(f"{IMAGE}: no bytes in this row")
        return found


def read_parquet(path: Path) -> Iterator[Record | BadRecord]:
    """One record or complaint for each row; the pictures' bytes are not read yet."""
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow ({error})") from error
    try:
        file = pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield BadRecord(str(path), f"not a parquet file: {error}")
        return
    columns = file.schema_arrow.names
    wanted = [name for name in (*PATHS, *CAPTION_KEYS, "weights") if name in columns]
    by_bytes = IMAGE in columns
    if not by_bytes and not set(PATHS) & set(columns):
        yield BadRecord(
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
                yield BadRecord(f"{path}:row {number}", str(error), error.kind)


# -- WebDataset shards: tar files whose members with one key (``0001.jpg``, ``0001.txt``) are one sample
#
# Read with the standard library: a shard's headers are gone through once, after which every picture can be
# read by itself from where it lies. The webdataset library only streams shards, in an order that cannot be
# resumed exactly or kept for other numbers of ranks.


_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key, extension: webdataset's rule
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TEXTS = ("txt", *CAPTION_KEYS)


@dataclass(frozen=True)
class Member:
    """A file inside a tar file."""

    name: str
    offset: int  # of its first byte
    size: int  # in bytes

    def __str__(self) -> str:
        return self.name

    def open(self, path: Path) -> BytesIO:
        """Bytes of the picture."""
        with path.open("rb") as shard:
            shard.seek(self.offset)
            return BytesIO(shard.read(self.size))


def expand(path: Path) -> list[Path]:
    """The files that a range such as ``shards/a-{000..012}.tar`` stands for; ``path`` itself without one."""
    match = _RANGE.search(path.name)
    if match is None:
        return [path]
    first, last = match[1], match[2]
    numbers = range(int(first), int(last) + 1)
    names = (f"{path.name[: match.start()]}{n:0{len(first)}d}{path.name[match.end() :]}" for n in numbers)
    return list(itertools.chain.from_iterable(expand(path.with_name(name)) for name in names))


def read_shard(path: Path) -> Iterator[Record | BadRecord]:
    """One record or complaint for each sample of a shard, in order."""
    try:
        with tarfile.open(path, "r:") as shard:
            for key, members in itertools.groupby(_members(shard), lambda member: member[0]):
                files: dict[str, tarfile.TarInfo] = {}  # of one sample, by extension
                try:
                    for _, extension, info in list(members):
                        if extension in files:
                            raise FieldError(extension, "two members of this name in one sample")
                        files[extension] = info
                    yield _sample(path, shard, files)
                except FieldError as error:
                    yield BadRecord(f"{path}:{key}", str(error), error.kind)
            with path.open("rb") as file:  # tarfile takes a cut-off header for the end mark too
                file.seek(shard.offset)
                if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it ends without an end mark, so samples may be missing")
    except (tarfile.TarError, EOFError) as error:
        yield BadRecord(
            str(path), f"not a whole, uncompressed tar file (pictures are read in place): {error}"
        )


def _members(shard: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, header) of every file that belongs to a sample."""
    for info in shard:
        match = _NAME.fullmatch(info.name)
        if match is not None and info.isreg():
            yield match[1], match[2].lower(), info
        shard.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def _sample(path: Path, shard: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> Record:
    pictures = [name for name in members if PurePosixPath(f"x.{name}").suffix in IMAGE_SUFFIXES]
    if not pictures:
        raise FieldError(
            "picture", f"no member .jpg, .png or the like beside .{', .'.join(members)}", "picture"
        )
    info = members[min(pictures, key=lambda name: name.count("."))]
    found = _captions(shard, members)
    return Record(path, found.texts, found.weights, inside=Member(info.name, info.offset_data, info.size))


def _captions(shard: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> Captions:
    """Captions of the member .txt (or .text, .prompt, .caption), else of .json."""
    for extension in _TEXTS:
        if extension in members:
            try:
                text = " ".join(_bytes(shard, members[extension]).decode("utf-8").split())
            except ValueError as error:
                raise FieldError(extension, f"not UTF-8: {error}", "caption") from error
            return row_captions({"text": text} if text else {})
    if "json" not in members:
        raise FieldError("txt", f"no caption, expected a member .{', .'.join(_TEXTS)} or .json", "caption")
    try:
        row = json.loads(_bytes(shard, members["json"]))
    except (ValueError, RecursionError) as error:
        raise FieldError("json", f"not JSON: {error}", "caption") from error
    if not isinstance(row, dict):
        raise FieldError("json", f"expected an object, got {type(row).__name__}", "caption")
    return row_captions(row)


def _bytes(shard: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = shard.extractfile(info)
    assert file is not None, "a regular file has bytes"
    return file.read()

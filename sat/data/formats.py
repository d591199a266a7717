"""Records from tables (JSON lines, CSV, TSV), parquet files and tar shards.

Readers yield records, complaints, and notes (plain strings) on what they leave out. ``keys`` are the names
that a caption may have, of which the first counts, or names with their weights, of which all count;
``columns`` are the columns of further pictures by the extra's name.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from sat.data.records import (
    CAPTION_KEYS,
    IMAGE_SUFFIXES,
    BadRecord,
    DataError,
    DataPathError,
    FieldError,
    PictureFile,
    Record,
    note,
)
from sat.util.host import check_regular, install, read_bounded
from sat.util.pictures import LARGEST_FILE

if TYPE_CHECKING:
    import pyarrow.parquet

LONGEST_TEXT = 16 << 20  # bytes of a caption file, and of a line of a table
TEXTS = ("txt", "text", "prompt", "caption")  # endings of files that are a caption
PATHS = ("file_name", "path", "image")  # columns that name a picture's file
Item = Record | BadRecord | str  # a note
Keys = Sequence[str] | Mapping[str, float]
Columns = Mapping[str, str]
NO_COLUMNS: Columns = MappingProxyType({})
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decoded(data: bytes) -> str:
    """Text in UTF-8, with or without its mark; ValueError for anything else."""
    if data.startswith(_UTF16) or b"\0" in data:
        raise ValueError("UTF-16 or no text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _lines(table: Path) -> Iterator[bytes]:
    """Lines of a table; ValueError where it is in UTF-16 or goes on without an end of line."""
    check_regular(table)
    with table.open("rb") as file:
        for number in itertools.count():
            line = file.readline(LONGEST_TEXT)
            if not line:
                return
            if number == 0 and line.startswith(_UTF16):
                raise ValueError("in UTF-16; save it as UTF-8")
            if len(line) == LONGEST_TEXT:
                raise ValueError(f"line {number + 1} has more than {LONGEST_TEXT} bytes")
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


class Captions(NamedTuple):
    """The captions of a row, and their sampling weights (empty: alike)."""

    texts: tuple[str, ...]
    weights: tuple[float, ...]


def row_captions(row: Mapping[str, object], keys: Keys = CAPTION_KEYS) -> Captions:
    """The captions of a row: one text or a list of them under the first of ``keys``, with ``weights``.

    With weighted ``keys``: those of all of them, each with its weight, shared by its texts.
    """
    if isinstance(keys, Mapping):
        several = [
            (row_captions(row, (key,)), keys[key]) for key in keys if row.get(key) not in (None, "", [])
        ]
        if not several:
            raise FieldError(next(iter(keys)), f"no caption, expected {' or '.join(keys)}", "caption")
        shares = [
            weight * own / sum(found.weights or (1,) * len(found.texts))
            for found, weight in several
            for own in (found.weights or (1,) * len(found.texts))
        ]
        return Captions(tuple(text for found, _ in several for text in found.texts), tuple(shares))
    there = [key for key in keys if row.get(key) is not None]
    if not there:
        raise FieldError(keys[0], f"no caption, expected one of {', '.join(keys)}", "caption")
    filled = [key for key in there if row[key] != [] and str(row[key]).strip()]
    key = (filled or there)[0]
    value = row[key]
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise FieldError(key, f"{value!r}, expected a caption or a list of captions", "caption")
    if any(re.search("[\0\ud800-\udfff]", text) for text in texts):
        raise FieldError(key, f"{value!r}: bytes or characters that are no text; save it as UTF-8", "caption")
    weights = row.get("weights")
    if weights is None:
        return Captions(texts, ())
    if not isinstance(weights, (list, tuple)) or not all(
        isinstance(weight, (int, float)) and not isinstance(weight, bool) for weight in weights
    ):
        raise FieldError("weights", f"{weights!r}, expected a list of numbers")
    try:
        Record(Path(), texts, found := tuple(map(float, weights)))
    except (ValueError, OverflowError) as error:
        raise FieldError("weights", str(error)) from error
    return Captions(texts, found)


def file_captions(ending: str, data: bytes, keys: Keys = CAPTION_KEYS) -> Captions:
    """The captions in the content of a file ``.txt`` and the like, or of a ``.json``."""
    first = next(iter(keys))
    try:
        text = decoded(data)
        row = json.loads(text) if ending == "json" else {first: " ".join(text.split())}
    except (ValueError, RecursionError) as error:
        raise FieldError(
            ending, f"not JSON: {error}" if ending == "json" else str(error), "caption"
        ) from error
    if not isinstance(row, dict):
        raise FieldError(ending, f"expected an object, got {type(row).__name__}", "caption")
    if ending != "json" and not row[first]:
        raise FieldError(ending, "empty caption", "caption")
    return row_captions(row, keys)


def beside_captions(files: Mapping[str, bytes], keys: Mapping[str, float]) -> Captions:
    """The captions in files beside a picture by their ending (``short.txt``, ``caption``, ``json``)."""
    row: dict[str, object] = {}
    for key in keys:
        ending = next((one for one in (key, *(f"{key}.{end}" for end in TEXTS)) if one in files), None)
        if ending is not None:
            row[key] = file_captions("txt", files[ending], (key,)).texts[0]
    if "json" in files:
        try:
            more = json.loads(decoded(files["json"]))
        except (ValueError, RecursionError) as error:
            raise FieldError("json", f"not JSON: {error}", "caption") from error
        row = {**(more if isinstance(more, dict) else {}), **row}
    return row_captions(row, keys)


def row_record(row: object, folder: Path, keys: Keys = CAPTION_KEYS, columns: Columns = NO_COLUMNS) -> Record:
    """The record of a row whose ``file_name`` (or ``path``, ``image``) is relative to ``folder``."""
    if not isinstance(row, dict):
        raise FieldError("row", f"expected an object with file_name and text, got {type(row).__name__}")
    name = next((row[key] for key in PATHS if isinstance(row.get(key), str) and row[key]), None)
    if name is None:
        raise FieldError("file_name", f"{row.get('file_name')!r}, expected the path of an image", "picture")
    found = row_captions(row, keys)
    path = _named(folder, name, "file_name")
    labels = {
        str(other): value
        for other, value in row.items()
        if isinstance(value, str) and other not in ("file_name", *CAPTION_KEYS, *keys, *columns.values())
    }
    return Record(path, found.texts, found.weights, labels, extras=_row_extras(row, folder, columns))


def _row_extras(row: Mapping[str, object], folder: Path, columns: Columns) -> dict[str, PictureFile]:
    """The further pictures that a row names."""
    extras = {}
    for extra, column in columns.items():
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise FieldError(column, f"{value!r}, expected the path of an image", "picture")
        if value:
            extras[extra] = PictureFile(_named(folder, value, column))
    return extras


def _named(folder: Path, name: str, column: str) -> Path:
    """The file ``name`` in ``folder``; FieldError where it is none."""
    path = folder / name
    try:
        name.encode()
        check_regular(path)
    except FileNotFoundError as error:
        raise FieldError(column, f"{name}: no such file", "picture") from error
    except (OSError, ValueError) as error:  # a FIFO, a folder; a name with a NUL or too long
        reason = getattr(error, "strerror", None) or error
        raise FieldError(column, f"{name}: {reason}", "picture") from error
    return path


def read_jsonl(table: Path, keys: Keys = CAPTION_KEYS, columns: Columns = NO_COLUMNS) -> Iterator[Item]:
    """One record or complaint for each line of a table of JSON objects."""
    try:
        for number, line in enumerate(_lines(table), 1):
            if not line.strip():
                continue
            try:
                yield row_record(json.loads(decoded(line)), table.parent, keys, columns)
            except FieldError as error:
                yield BadRecord(f"{table}:{number}", str(error), error.kind)
            except (ValueError, RecursionError) as error:
                yield BadRecord(f"{table}:{number}", f"row: not JSON: {error}")
    except (OSError, ValueError) as error:
        yield BadRecord(str(table), str(getattr(error, "strerror", None) or error))


@dataclass(frozen=True)
class PromptLine:
    """The place of a caption without a picture: a line of a list of prompts."""

    number: int

    def __str__(self) -> str:
        return f"line {self.number}"

    def open(self, path: Path) -> BytesIO:
        """Nothing to open: :class:`ValueError`."""
        raise ValueError("is a list of prompts, without pictures")


def read_prompts(table: Path) -> Iterator[Item]:
    """One record without a picture for each line of a list of prompts."""
    try:
        for number, line in enumerate(_lines(table), 1):
            if text := decoded(line).strip():
                yield Record(table, (text,), inside=PromptLine(number))
    except (OSError, ValueError) as error:
        yield BadRecord(str(table), str(getattr(error, "strerror", None) or error))


def read_csv(table: Path, keys: Keys = CAPTION_KEYS, columns: Columns = NO_COLUMNS) -> Iterator[Item]:
    """One record or complaint for each row of a table with a header: ``.tsv`` by tabs, others by commas."""
    parts = (part for line in _lines(table) for part in re.split(rb"(?<=\r)(?!\n)", line))  # of old Macs
    lines = (part.decode("utf-8", "surrogateescape") for part in parts if part)
    rows = csv.reader(lines, delimiter="\t" if table.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] = []
    while True:
        start = rows.line_num + 1
        try:
            cells = next(rows)
            if header and cells:
                yield row_record(_fitted(header, cells), table.parent, keys, columns)
            elif cells:
                header = _header(cells, keys)
        except StopIteration:
            return
        except csv.Error as error:  # a quote that is not closed takes the rest with it
            for line in range(start, rows.line_num + 1):
                yield BadRecord(f"{table}:{line}", f"row: not a table of quoted or plain fields: {error}")
        except FieldError as error:
            yield BadRecord(f"{table}:{start}", str(error), error.kind)
            if not header:
                return
        except (OSError, ValueError) as error:
            yield BadRecord(str(table), str(getattr(error, "strerror", None) or error))
            return


def _header(cells: Sequence[str], keys: Keys) -> list[str]:
    """Names of the columns; FieldError unless pictures and captions are among them, each once."""
    columns = [cell.strip() for cell in cells]
    has = ", ".join(columns)
    for needed in (PATHS, keys):
        if not set(needed) & set(columns):
            raise FieldError(next(iter(needed)), f"no column {' or '.join(needed)} (there are: {has})")
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise FieldError(twice[0], f"two columns of this name (there are: {has})")
    return columns


def _fitted(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    """The filled cells by column; FieldError where their number is another and more than blanks differ."""
    if len(cells) < len(columns) or any(cell.strip() for cell in cells[len(columns) :]):
        raise FieldError(
            "row", f"{len(cells)} fields where the header has {len(columns)}; quote texts with separators"
        )
    return {name: cell for name, cell in zip(columns, cells, strict=False) if cell.strip()}


# -- parquet tables: pictures as bytes (also Hugging Face's ``image`` column) or as paths, and captions


IMAGE = "image"
KEPT = 4  # row groups of pictures in memory, for each file
LARGE_GROUP = 1 << 30  # bytes
LISTED = 1000  # rows at most that a damaged row group is listed with


@dataclass(frozen=True)
class Row:
    """A picture in a column."""

    number: int  # of the row in the file, from 1
    group: int
    place: int  # in its row group
    pictures: _Pictures = field(repr=False, compare=False)

    def __str__(self) -> str:
        column = self.pictures.column
        return f"row {self.number}" + ("" if column == IMAGE else f" {column}")

    def open(self, path: Path) -> BytesIO:
        """Bytes of the picture, out of the column or of the file beside the table that it names instead."""
        value = self.pictures.read(self.group, self.place)
        found = value.get("bytes") if isinstance(value, dict) else value
        named = value.get("path") if isinstance(value, dict) else None
        if found is None and isinstance(named, str):
            found = read_bounded(path.parent / named, LARGEST_FILE)
        if not isinstance(found, bytes):
            raise ValueError(f"{self.pictures.column}: no bytes in this row")
        return BytesIO(found)


class _Pictures:
    """A column of pictures in a file: the row groups read last are kept. Safe for several threads."""

    def __init__(self, file: pyarrow.parquet.ParquetFile, column: str) -> None:
        self._file, self.column = file, column
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def read(self, group: int, place: int) -> object:
        """The value of one row: bytes, or bytes and path."""
        with self._lock:
            if group not in self._groups:
                try:
                    read = self._file.read_row_group(group, columns=[self.column])
                    self._groups[group] = read.column(self.column)
                except Exception as error:  # Arrow's have kinds of their own
                    raise ValueError(f"{self.column}: {error}") from error
                if len(self._groups) > KEPT:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(group)
            value: object = self._groups[group][place].as_py()
        return value


def lists_addresses(path: Path) -> bool:
    """True for a parquet file of addresses, as img2dataset leaves beside what it fetched from there."""
    if path.suffix.lower() != ".parquet":
        return False
    try:
        import pyarrow.parquet as pq

        columns = {*pq.read_schema(path).names}
    except Exception:  # noqa: BLE001 - no pyarrow or no parquet: the reader says so
        return False
    return "url" in columns and not columns & {IMAGE, *PATHS}


def read_parquet(  # noqa: C901 - the file, its columns, its rows
    path: Path, keys: Keys = CAPTION_KEYS, columns: Columns = NO_COLUMNS
) -> Iterator[Item]:
    """One record or complaint for each row; the pictures' bytes are not read yet."""
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: {install('parquet')} ({error})") from error
    try:
        check_regular(path)
        file = pq.ParquetFile(path)
        kinds = {column.name: column.type for column in file.schema_arrow}
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield BadRecord(str(path), f"not a parquet file: {error}")
        return
    text = (pyarrow.string(), pyarrow.large_string())
    by_bytes = IMAGE in kinds and kinds[IMAGE] not in text
    has = ", ".join(kinds)
    if not by_bytes and not set(PATHS) & kinds.keys():
        yield BadRecord(str(path), f"{IMAGE}: no column {' or '.join(PATHS)} (there are: {has})")
        return
    if not set(keys) & kinds.keys():
        first = next(iter(keys))
        yield BadRecord(str(path), f"{first}: no column {' or '.join(keys)} (there are: {has})", "caption")
        return
    sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    if by_bytes and max(sizes, default=0) > LARGE_GROUP:
        yield (
            f"{path}: a row group has {max(sizes) / 1e9:.1f} GB and {KEPT} are kept in memory; write it "
            "with fewer rows a group (row_group_size=100)"
        )
    columns = {extra: column for extra, column in columns.items() if column in kinds}
    whole = {extra: _Pictures(file, column) for extra, column in columns.items() if kinds[column] not in text}
    named = {extra: column for extra, column in columns.items() if extra not in whole}
    asked = {*PATHS, *keys, "weights", *named.values()} - {IMAGE if by_bytes else ""}
    wanted = [name for name in kinds if name in asked]
    pictures = _Pictures(file, IMAGE)
    number = 0
    for group in range(file.num_row_groups):
        try:
            rows = file.read_row_group(group, columns=wanted).to_pylist()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            for lost in range(number + 1, number + 1 + file.metadata.row_group(group).num_rows)[:LISTED]:
                yield BadRecord(f"{path}:row {lost}", f"row: damaged: {error}")
            rows = []
        for place, row in enumerate(rows):

            def at(column: _Pictures, place: int = place, group: int = group, start: int = number) -> Row:
                return Row(start + place + 1, group, place, column)

            extras = {extra: PictureFile(path, inside=at(column)) for extra, column in whole.items()}
            try:
                if by_bytes:
                    found = row_captions(row, keys)
                    extras |= _row_extras(row, path.parent, named)
                    yield Record(path, found.texts, found.weights, inside=at(pictures), extras=extras)
                else:
                    record = row_record(row, path.parent, keys, named)
                    yield replace(record, extras={**record.extras, **extras}) if extras else record
            except FieldError as error:
                yield BadRecord(f"{path}:row {number + place + 1}", str(error), error.kind)
        number += file.metadata.row_group(group).num_rows


# -- WebDataset shards: tar files whose members with one key (``0001.jpg``, ``0001.txt``) are one sample
#
# Read with the standard library: a shard's headers are gone through once, after which every picture can be
# read by itself from where it lies. The webdataset library only streams shards, in an order that cannot be
# resumed exactly or kept for other numbers of ranks.


_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key, extension: webdataset's rule
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_SHARDS = 1_000_000  # files of a range
LONGEST_PADDING = 2 << 20  # bytes of zeros at the end of a shard; tar writes 11 kB, with -b up to 1 MiB


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
        if self.size > LARGEST_FILE:
            raise ValueError(f"has {self.size} bytes, more than {LARGEST_FILE}")
        with path.open("rb") as shard:
            shard.seek(self.offset)
            return BytesIO(shard.read(self.size))


def expand(path: Path) -> list[Path]:
    """The files that a range such as ``shards/a-{000..012}.tar`` stands for; ``path`` itself without one."""
    match = _RANGE.search(path.name)
    if match is None:
        return [path]
    first, last = match[1], match[2]
    if not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise DataPathError(f"{path}: a range goes from a number to a larger one, over {MOST_SHARDS} at most")
    numbers = range(int(first), int(last) + 1)
    names = (f"{path.name[: match.start()]}{n:0{len(first)}d}{path.name[match.end() :]}" for n in numbers)
    return list(itertools.chain.from_iterable(expand(path.with_name(name)) for name in names))


def read_shard(  # noqa: C901 - members, samples, damage
    path: Path, keys: Keys = CAPTION_KEYS, columns: Columns = NO_COLUMNS
) -> Iterator[Item]:
    """One record or complaint for each sample of a shard, in order, and for each damaged part."""
    known, others, several, damage = set[str](), list[str](), list[str](), list[str]()
    try:
        check_regular(path)
        with tarfile.open(path, "r:") as shard:
            shard.ignore_zeros = True  # goes on behind damage, which is told
            members = _members(path, shard, others, damage)
            for key, found in itertools.groupby(members, lambda member: member[0]):
                files: dict[str, tarfile.TarInfo] = {}  # of one sample, by extension
                try:
                    for _, extension, info in list(found):
                        if extension in files:
                            raise FieldError(extension, "two members of this name in one sample")
                        files[extension] = info
                    if key in known:
                        raise FieldError("key", "came before; the members of a sample lie together, once")
                    known.add(key)
                    yield _sample(path, shard, files, keys, columns)
                    if sum(f".{ending}" in IMAGE_SUFFIXES for ending in files) > 1:
                        several.append(key)
                except FieldError as error:
                    yield BadRecord(f"{path}:{key}", str(error), error.kind)
    except Exception as error:  # noqa: BLE001 - tarfile raises anything on damaged headers
        damage.append(str(getattr(error, "strerror", None) or error or type(error).__name__))
    for reason in damage:
        yield BadRecord(
            str(path), f"not a whole, uncompressed tar file (pictures are read in place): {reason}"
        )
    yield from note(f"members of {path} that belong to no sample", others)
    yield from note(f"samples of {path} with several pictures, of which the first is used", several)


def _members(
    path: Path, shard: tarfile.TarFile, others: list[str], damage: list[str]
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, extension, header) of every file that belongs to a sample; the names of others, and damage.

    Each member begins where the one before it ends, and nothing but zeros follows the last.
    """
    end, zeros = 0, tarfile.NUL * tarfile.BLOCKSIZE
    with path.open("rb") as file:
        for info in shard:
            if info.offset != end:
                file.seek(end)
                try:  # a header for all that follow is no member
                    tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
                except tarfile.TarError:
                    damage.append(
                        f"{info.offset - end} bytes before {info.name} are no member, samples may be missing"
                    )
            end = shard.offset  # of what follows the member
            match = _NAME.fullmatch(info.name)
            if match is not None and info.isreg():
                yield match[1], match[2].lower(), info
            elif not info.isdir():
                others.append(info.name)
            shard.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen
        file.seek(end)
        if file.read(len(zeros)) != zeros:
            damage.append("it ends without an end mark, so samples may be missing")
        elif any(part.strip(tarfile.NUL) for part in iter(lambda: file.read(1 << 20), b"")):
            damage.append("it goes on behind its end mark, so samples may be missing")
        elif (left := file.tell() - end) > LONGEST_PADDING:
            damage.append(f"its last {left} bytes are zeros, so samples may be missing")


def _sample(
    path: Path,
    shard: tarfile.TarFile,
    members: dict[str, tarfile.TarInfo],
    keys: Keys,
    columns: Columns,
) -> Record:
    pictures = [name for name in members if PurePosixPath(f"x.{name}").suffix in IMAGE_SUFFIXES]
    extras = {
        extra: PictureFile(path, inside=_member(members[name]))
        for extra, column in columns.items()
        for name in pictures
        if name.rpartition(".")[0] == column.lower()
    }
    pictures = [name for name in pictures if name.rpartition(".")[0] not in map(str.lower, columns.values())]
    if not pictures:
        raise FieldError(
            "picture", f"no member .jpg, .png or the like beside .{', .'.join(members)}", "picture"
        )
    picture = _member(members[min(pictures, key=lambda name: name.count("."))])

    def content(ending: str) -> bytes:
        info = members[ending]
        if info.size > LONGEST_TEXT:
            raise FieldError(ending, f"{info.size} bytes, expected {LONGEST_TEXT} at most", "caption")
        file = shard.extractfile(info)
        assert file is not None, "a regular file has bytes"
        return file.read()

    if isinstance(keys, Mapping):
        texts = [one for one in members if one.rpartition(".")[2] in (*TEXTS, "json")]
        found = beside_captions({one: content(one) for one in texts}, keys)
        return Record(path, found.texts, found.weights, inside=picture, extras=extras)
    ending = next((one for one in (*TEXTS, "json") if one in members), None)
    if ending is None:
        raise FieldError("txt", f"no caption, expected a member .{', .'.join(TEXTS)} or .json", "caption")
    found = file_captions(ending, content(ending), keys)
    return Record(path, found.texts, found.weights, inside=picture, extras=extras)


def _member(info: tarfile.TarInfo) -> Member:
    if info.issparse():
        raise FieldError("picture", f"{info.name} is stored as a sparse file", "picture")
    return Member(info.name, info.offset_data, info.size)

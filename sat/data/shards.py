"""WebDataset shards: tar files whose members with one key (``0001.jpg``, ``0001.txt``) are one sample.

Read with the standard library: a shard's headers are gone through once, after which every picture can be read
by itself from where it lies. The webdataset library only streams shards, in an order that cannot be resumed
exactly or kept for other numbers of ranks.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

from sat.data.records import CAPTION_KEYS, IMAGE_SUFFIXES, Bad, FieldError, Record
from sat.data.tables import Captions, row_captions

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
        """Its bytes."""
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


def read_shard(path: Path) -> Iterator[Record | Bad]:
    """One record or complaint for each sample of a shard, in order."""
    try:
        with tarfile.open(path, "r:") as shard:
            for key, members in itertools.groupby(_members(shard), lambda pair: pair[0]):
                try:
                    yield _sample(path, shard, _unique(pair for _, pair in members))
                except FieldError as error:
                    yield Bad(f"{path}:{key}", str(error), error.kind)
            if not _ended(path, shard.offset):
                raise tarfile.ReadError("it ends without an end mark, so samples may be missing")
    except (tarfile.TarError, EOFError) as error:
        yield Bad(str(path), f"not a whole, uncompressed tar file (pictures are read in place): {error}")


def _ended(path: Path, offset: int) -> bool:
    """Whether the end mark of a tar file is at ``offset``; tarfile takes a cut-off header for it too."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == tarfile.NUL * tarfile.BLOCKSIZE


def _members(shard: tarfile.TarFile) -> Iterator[tuple[str, tuple[str, tarfile.TarInfo]]]:
    """(key, (extension, header)) of every file that belongs to a sample."""
    for info in shard:
        match = _NAME.fullmatch(info.name)
        if match is not None and info.isreg():
            yield match[1], (match[2].lower(), info)
        shard.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it has seen


def _unique(pairs: Iterable[tuple[str, tarfile.TarInfo]]) -> dict[str, tarfile.TarInfo]:
    """The members of a sample by extension."""
    found: dict[str, tarfile.TarInfo] = {}
    for extension, info in list(pairs):
        if extension in found:
            raise FieldError(extension, "two members of this name in one sample")
        found[extension] = info
    return found


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
    """Of the member .txt (or .text, .prompt, .caption), else out of .json."""
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

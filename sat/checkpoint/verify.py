"""Digests of weight files: written in chunks, and checked on a thread while a file is read.

A record of a file, in ``manifest.json`` of a native folder or ``digests.json`` beside other files, is::

    {"name": …, "bytes": …, "sha256": …, "chunks": {"bytes": 4194304, "xxh3": [one a chunk]}, "check": …}

``check`` is over the record itself. Records of before hold ``sha256`` alone: such a file is read once, and
remembered by its size, time and inode in the user's cache folder. PyTorch files without a record have the
CRC-32 of their zip.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import threading
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

from sat.errors import UserError
from sat.util.host import read_bounded

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # of a native folder
DIGESTS = "digests.json"  # beside the files of any other folder that we wrote
CHUNK = 4 << 20  # bytes
_MOST_JSON = 1 << 24  # bytes
_HEX = re.compile(r"[0-9a-f]{64}")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read, used or written. The message is one line a user can act on."""

    exit_code = 1


class CheckpointPathError(CheckpointError):
    """A path that cannot be read or written as a checkpoint: the user named the wrong one."""

    exit_code = 2


@dataclass(frozen=True)
class Verify:
    """Check of files. ``full``: contents; ``manifest``: names, sizes and counts only; or ``off``.

    ``size`` ranks read the same files: each checks its share, and ``agree`` brings together what they found
    (None for nothing), on every rank.
    """

    mode: Literal["full", "manifest", "off"] = "full"
    rank: int = 0
    size: int = 1
    agree: Callable[[str | None], list[str | None]] = lambda found: [found]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, an error of one rank becomes one of all that share the work."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        found = self.agree(None if own is None else str(own))
        if own is not None:
            raise own
        if others := [text for text in found if text is not None]:
            raise CheckpointError(others[0])


# -- records


@dataclass(frozen=True)
class Written:
    """A finished file: bytes, SHA-256 and chunk digests of its content."""

    nbytes: int
    sha256: str
    chunks: tuple[str, ...] = ()

    def record(self, name: str) -> dict[str, Any]:
        """Record of the file under ``name``, as the module's documentation shows it."""
        record: dict[str, Any] = {"name": name, "bytes": self.nbytes, "sha256": self.sha256}
        record["chunks"] = {"bytes": CHUNK, "xxh3": list(self.chunks)}
        return {**record, "check": own_check(record)}


def own_check(record: Mapping[str, Any]) -> str:
    """Digest of ``record`` itself, without its ``check``."""
    text = json.dumps({k: v for k, v in record.items() if k != "check"}, sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


class Digester:
    """Digests of a file's content, fed piece by piece."""

    def __init__(self) -> None:
        self._whole, self._chunk = hashlib.sha256(), xxhash.xxh3_64()
        self._nbytes, self._chunks = 0, list[str]()

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        """Add ``piece`` (bytes) to the content."""
        view = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
        self._whole.update(view)
        while len(view):
            part = view[: CHUNK - self._nbytes % CHUNK]
            self._chunk.update(part)
            self._nbytes += len(part)
            view = view[len(part) :]
            if self._nbytes % CHUNK == 0:
                self._chunks.append(self._chunk.hexdigest())
                self._chunk.reset()

    def written(self) -> Written:
        """Digest of the whole content."""
        last = [self._chunk.hexdigest()] if self._nbytes % CHUNK else []
        return Written(self._nbytes, self._whole.hexdigest(), (*self._chunks, *last))


def digest_file(path: Path) -> Written:
    """Digests of the file ``path``, read whole."""
    digester = Digester()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digester.update(piece)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return digester.written()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which is a regular one of 16 MiB at most."""
    try:
        content = json.loads(read_bounded(path, _MOST_JSON))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def record_of(path: Path) -> dict[str, Any] | None:
    """Record of ``path`` in a digests.json or manifest.json beside it or one folder up, None without one."""
    for file in (path.parent / DIGESTS, path.parent / MANIFEST, path.parent.parent / MANIFEST):
        if not file.is_file():
            continue
        name = path.relative_to(file.parent).as_posix()
        for record in records(file):
            if record["name"] == name:
                return record
    return None


def records(file: Path) -> list[dict[str, Any]]:
    """Checked records in a manifest.json or digests.json; empty for a manifest that is not ours."""
    content = read_json(file)
    try:
        groups = [content] if file.name == DIGESTS else [*content.get("parts", {}).values()]
        listed = [r for group in groups for r in group["files"]]
        listed += content.get("tokenizer", []) if file.name == MANIFEST else []
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: the list of files is damaged ({error})") from error
    for record in listed:
        if problem := _malformed(record):
            raise CheckpointError(f"{file}: the list of files is damaged: {problem}; copy it again")
    return listed


def _malformed(record: object) -> str | None:
    """Fault in the form of a record, or None."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return "an entry has no name"
    name, nbytes, sha = record["name"], record.get("bytes"), record.get("sha256")
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 0:
        return f"bytes of {name!r} is {str(nbytes)[:80]!r}, expected a size"
    if not isinstance(sha, str) or not _HEX.fullmatch(sha):
        return f"sha256 of {name!r} is {str(sha)[:80]!r}, expected 64 hexadecimal digits"
    if "chunks" not in record and "check" not in record:
        return None  # of before there were chunks
    if record.get("check") != own_check(record):
        return f"the entry of {name!r} is not the one that was written"
    return None


# -- checking


class Range(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file and the digest they must have."""

    begin: int
    end: int
    digest: str


xxh3 = xxhash.xxh3_64_hexdigest


def crc32(content: memoryview | bytes) -> str:
    """CRC-32 of ``content``, 8 hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


class FileCheck:
    """Check of one file's ranges, on a thread that starts with the first read.

    A reader waits for the ranges it uses, and checks those itself that the thread has not come to. Where
    ranks share the work nobody waits: :meth:`finish` tells what is wrong, before the weights are used.
    """

    def __init__(
        self,
        path: Path,
        ranges: Sequence[Range],
        how: Verify,
        kind: Callable[[Any], str] = xxhash.xxh3_64_hexdigest,
    ) -> None:
        self.path, self._ranges, self._kind = path, ranges, kind
        self._begins = [r.begin for r in ranges]
        self.alone = how.size == 1  # nobody else checks a share
        self._state = bytearray(len(ranges))  # 0 nobody's yet, 1 being checked, 2 good
        self._own = range(how.rank, len(ranges), how.size)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._problem: str | None = None
        self._stop = False

    def first(self, end: int) -> None:
        """Check the bytes up to ``end`` now, on every rank: a header, before it is believed."""
        for number, place in enumerate(self._ranges):
            if place.begin < end:
                self._check(number)
        self._raise()

    def wait(self, begin: int, end: int) -> None:
        """Return once the bytes ``begin`` to ``end`` are known to be good; raise if they are not."""
        self._start()
        if not self.alone or begin >= end:
            return
        for number in range(max(0, bisect_right(self._begins, begin) - 1), len(self._ranges)):
            if self._ranges[number].begin >= end:
                break
            self._check(number)
            with self._changed:
                self._changed.wait_for(lambda number=number: self._state[number] == 2 or self._problem)  # type: ignore[misc]
            self._raise()

    def finish(self) -> None:
        """Wait for the whole file, or this rank's share of it; raise if it is damaged."""
        self._start()
        assert self._thread is not None, "started above"
        self._thread.join()
        self._raise()

    def close(self) -> None:
        """End the thread."""
        self._stop = True
        if self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None and not self._stop:
            self._thread = threading.Thread(target=self._run, name="verify", daemon=True)
            self._thread.start()

    def _raise(self) -> None:
        if self._problem is not None:
            raise CheckpointError(self._problem)

    def _run(self) -> None:
        for number in self._own:
            if self._stop or self._problem is not None:
                return
            self._check(number)

    def _check(self, number: int) -> None:
        """Check one range unless somebody has or does."""
        with self._changed:
            if self._state[number]:
                return
            self._state[number] = 1
        begin, end, wanted = self._ranges[number]
        problem, found, skip = None, self._kind(b""), begin % mmap.ALLOCATIONGRANULARITY
        try:
            if end > begin:  # mapped: hashed where it lies, without a copy
                with (
                    self.path.open("rb", buffering=0) as file,
                    mmap.mmap(
                        file.fileno(), skip + end - begin, access=mmap.ACCESS_READ, offset=begin - skip
                    ) as window,
                    memoryview(window)[skip:] as content,
                ):
                    found = self._kind(content)
        except OSError as error:
            problem = f"{self.path}: {error.strerror or error}"
        except ValueError:  # it cannot be mapped: shorter than it was a moment ago
            problem = f"{self.path}: truncated: it ends before byte {end:,}; copy or download it again"
        else:
            if found != wanted:
                problem = (
                    f"{self.path}: damaged: bytes {begin:,} to {end:,} are not those that were written; "
                    f"copy or download it again"
                )
        with self._changed:
            self._state[number] = 2
            self._problem = self._problem or problem
            self._changed.notify_all()


def check_file(path: Path, how: Verify) -> FileCheck | None:
    """Check of ``path`` by its record; None without one."""
    if how.mode != "full" or (record := record_of(path)) is None:
        return None
    return check_record(path, record, how)


def check_record(path: Path, record: Mapping[str, Any], how: Verify) -> FileCheck:
    """Check of ``path`` by ``record``; an old one, with a SHA-256 alone, is dealt with at once."""
    size = path.stat().st_size
    if size != record["bytes"]:
        state = "truncated" if size < record["bytes"] else "not the file that was written"
        raise CheckpointError(
            f"{path}: {state}: {size:,} bytes, {record['bytes']:,} in its manifest; copy it again"
        )
    if "chunks" not in record:
        if zlib.crc32(record["name"].encode()) % how.size == how.rank:
            _check_once(path, record["sha256"])
        return FileCheck(path, [], how)
    try:
        step, digests = int(record["chunks"]["bytes"]), list(record["chunks"]["xxh3"])
        if step < 1 or len(digests) != -(-size // step):
            raise ValueError(f"{len(digests)} chunks for {size:,} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its chunk digests are damaged ({error}); copy it again") from error
    ranges = [Range(i * step, min((i + 1) * step, size), str(digest)) for i, digest in enumerate(digests)]
    return FileCheck(path, ranges, how)


def verify_file(path: Path, how: Verify | None = None) -> bool:
    """Check ``path`` now, by its record; false if it has none. Raises CheckpointError if it is damaged."""
    if (check := check_file(path, how or Verify())) is None:
        return False
    check.finish()
    return True


# -- files with a SHA-256 alone, checked once


def _memory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "cogview3-sat" / "verified.json"


def _check_once(path: Path, sha256: str) -> None:
    """Compare the SHA-256 of ``path``, unless this very file was good before."""
    stat, name, file = path.stat(), str(path.resolve()), _memory()
    mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256]
    known: Any = {}
    with suppress(OSError, ValueError, RecursionError):
        known = json.loads(file.read_bytes())
    if not isinstance(known, dict):
        known = {}
    if known.get(name) == mark:
        logger.debug("%s: its SHA-256 was right before, and its size, time and inode are the same", path)
        return
    if digest_file(path).sha256 != sha256:
        raise CheckpointError(
            f"{path}: damaged: its SHA-256 is not the one in its manifest; copy or download it again"
        )
    logger.debug("%s: its SHA-256 is right, remembered in %s", path, file)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**known, name: mark}, indent=1))
        partial.replace(file)

"""Votes on disk: one JSON object a line, appended and flushed one by one, so that a crash loses none."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from sat.data.records import DataError

log = logging.getLogger(__name__)

Choice = Literal["a", "b", "tie"]
CHOICES: Sequence[Choice] = ("a", "b", "tie")


@dataclass(frozen=True)
class Vote:
    """What ``rater`` chose. ``left``: the picture that stood on the left; ``seconds`` of looking."""

    rater: str
    pair: str
    question: str
    choice: Choice
    left: Literal["a", "b"]
    seconds: float


class VoteFile:
    """The votes about one set of pairs, open in one process at a time; a later vote replaces an earlier one.

    The first line says what the votes are about; a file about something else is refused.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._claim()
            self._mend()
            self.votes = dict(_keyed(read(path, about)))
            if os.fstat(self._file).st_size == 0:
                self._append(dict(about))
        except BaseException:
            os.close(self._file)
            raise

    def add(self, vote: Vote) -> None:
        """Append ``vote``; it is on the disk when this returns."""
        with self._lock:
            self._append(asdict(vote) | {"time": round(time.time(), 3)})
            self.votes |= _keyed([vote])

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def __enter__(self) -> VoteFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if os.write(self._file, line) != len(line):
            raise OSError(f"{self.path}: the disk took only a part of a vote")
        os.fsync(self._file)

    def _claim(self) -> None:
        """Refuse a file that another process has open."""
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl

            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"{self.path}: another page is writing votes to it; end that one first"
                ) from error

    def _mend(self) -> None:
        """Drop a last line that a crash cut short."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            log.warning("%s: its last line was cut short and is dropped", self.path)
            os.ftruncate(self._file, whole)


def _keyed(votes: Sequence[Vote]) -> dict[tuple[str, str, str], Vote]:
    return {(vote.rater, vote.pair, vote.question): vote for vote in votes}


def read(path: Path, about: Mapping[str, Any]) -> list[Vote]:
    """The votes in ``path`` that count, the last of each rater for each question about each pair."""
    rows = list(_rows(path))
    if rows and rows[0][1] != dict(about):
        raise DataError(
            f"{path}: holds votes about other pictures, other questions or with another seed; "
            f"name another file with --votes"
        )
    votes: list[Vote] = []
    for number, row in rows[1:]:
        try:
            vote = Vote(**{name: row[name] for name in Vote.__dataclass_fields__})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a vote") from error
        if vote.choice not in CHOICES:
            raise DataError(
                f"{path}, line {number}: choice {vote.choice!r}, expected one of {', '.join(CHOICES)}"
            )
        votes.append(vote)
    return list(_keyed(votes).values())


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and objects; a last line without its end is not read."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text("utf-8").split("\n")[:-1], 1):
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error

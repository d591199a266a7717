"""Votes on disk, and their statistics: win rates with their uncertainty, and agreement of raters.

A vote is one JSON object a line, appended and flushed one by one, so that a crash loses none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sat.data.records import DataError

log = logging.getLogger(__name__)

Side = Literal["a", "b"]
Choice = Literal["a", "b", "tie"]
CHOICES: Sequence[Choice] = ("a", "b", "tie")


@dataclass(frozen=True)
class Vote:
    """The choice of ``rater``. ``left``: the picture that stood on the left; ``seconds`` of looking."""

    rater: str
    pair: str
    question: str
    choice: Choice
    left: Side
    seconds: float


class VoteFile:
    """The votes about one set of pairs, open in one process at a time; a later vote replaces an earlier one.

    The first line is ``about``; a file about other pairs or questions is refused.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    raise DataError(
                        f"{path}: another page is writing votes to it; end that one first"
                    ) from error
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole != len(content):
                log.warning("%s: its last line was cut short and is dropped", path)
                os.ftruncate(self._file, whole)
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


# -- statistics


Z95 = 1.959963984540054
"""Standard deviations that hold 95 % of a normal distribution."""

DRAWS = 10_000
"""Of the bootstrap."""


class Interval(NamedTuple):
    """95 % confidence limits."""

    low: float
    high: float


class Tally(NamedTuple):
    """Votes for A, undecided ones and votes for B."""

    wins: int
    ties: int
    losses: int

    @property
    def total(self) -> int:
        """All votes."""
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class Outcome:
    """Result of A. ``half`` counts a tie as half a win, ``decided`` leaves ties out (None: all are ties).

    ``wilson`` is of ``decided``, as if every vote were independent; the ``*_interval`` resample prompts,
    since votes about one prompt are not.
    """

    tally: Tally
    half: float
    half_interval: Interval
    decided: float | None
    decided_interval: Interval | None
    wilson: Interval | None
    prompts: int


def tally(votes: Sequence[Vote]) -> Tally:
    """Counts of ``votes``."""
    counts = Counter(vote.choice for vote in votes)
    return Tally(counts["a"], counts["tie"], counts["b"])


def outcome(votes: Sequence[Vote], seed: int = 0) -> Outcome:
    """The :class:`Outcome` of ``votes``, of which there is at least one."""
    total = tally(votes)
    grouped: dict[str, list[Vote]] = {}
    for vote in votes:  # a pair's name begins with the number of its prompt
        grouped.setdefault(vote.pair.partition("_")[0], []).append(vote)
    counts = np.array([tally(group) for group in grouped.values()], dtype=np.int64)  # (prompts, 3)
    decided = total.wins + total.losses

    def without_ties(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        sums = counts[:, 0] + counts[:, 2]
        shares: NDArray[np.float64] = counts[sums > 0, 0] / sums[sums > 0]
        return shares

    return Outcome(
        tally=total,
        half=(total.wins + total.ties / 2) / total.total,
        half_interval=bootstrap(counts, lambda n: (n[:, 0] + n[:, 1] / 2) / n.sum(1), seed),
        decided=total.wins / decided if decided else None,
        decided_interval=bootstrap(counts, without_ties, seed) if decided else None,
        wilson=wilson(total.wins, decided) if decided else None,
        prompts=len(counts),
    )


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share. Source: Wilson 1927."""
    share, square = successes / trials, Z95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = Z95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(
    counts: NDArray[Any], share: Callable[[NDArray[Any]], NDArray[np.float64]], seed: int
) -> Interval:
    """The middle 95 % of ``share`` over draws of as many prompts with replacement (percentile bootstrap).

    ``counts`` (prompts, K) is added up over a draw; ``share`` takes many draws (B, K) and gives (B) values.
    Source: Efron and Tibshirani 1993, section 13.3.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(0, DRAWS, 500):
        chosen = rng.integers(len(counts), size=(500, len(counts)))
        found.append(share(counts[chosen].sum(1)))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Interval(float(low), float(high))


class Agreement(NamedTuple):
    """Of several raters on the same questions. ``alpha``: 1 is agreement, 0 what chance gives."""

    alpha: float | None  # None: nobody answered the same question, or all answers are one
    same: float | None  # share of pairs of raters that chose alike
    questions: int  # answered by two or more


def agreement(votes: Sequence[Vote]) -> Agreement:
    """Krippendorff's alpha for nominal values (A, B, tie), with any number of raters a question.

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability"; for two raters without gaps it is
    Scott's pi with a correction for small numbers.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for vote in votes:
        grouped.setdefault((vote.pair, vote.question), []).append(vote.choice)
    units = [Counter(values) for values in grouped.values() if len(values) > 1]
    if not units:
        return Agreement(None, None, 0)
    totals = sum(units, Counter())
    count = totals.total()
    observed = sum(1 - _alike(unit) for unit in units for _ in range(unit.total())) / count
    expected = 1 - _alike(totals)
    pairs = sum(math.comb(unit.total(), 2) for unit in units)
    same = sum(math.comb(n, 2) for unit in units for n in unit.values()) / pairs
    return Agreement(None if expected == 0 else 1 - observed / expected, same, len(units))


def _alike(values: Counter[str]) -> float:
    """Chance that two different ones of ``values`` are the same."""
    count = values.total()
    return sum(n * (n - 1) for n in values.values()) / (count * (count - 1))


def summary(votes: Sequence[Vote], a: str, b: str) -> list[str]:
    """Lines for the terminal."""
    if not votes:
        return ["no votes yet"]

    def limits(interval: Interval) -> str:
        return f"[{interval.low:.1%}, {interval.high:.1%}]"

    lines, rates = [f"{a} against {b}"], []
    for question in dict.fromkeys(vote.question for vote in votes):
        found = outcome([vote for vote in votes if vote.question == question])
        counts = found.tally
        rates.append(found.half)
        lines += [
            f"{question}: {a} won {counts.wins}, tied {counts.ties}, lost {counts.losses} of {counts.total} "
            f"votes on {found.prompts} prompts",
            f"{question}: win rate {found.half:.1%} {limits(found.half_interval)}, ties counting half",
        ]
        if found.decided is not None and found.decided_interval is not None and found.wilson is not None:
            lines.append(
                f"{question}: win rate {found.decided:.1%} {limits(found.decided_interval)} without ties; "
                f"{limits(found.wilson)} if votes on one prompt were independent (Wilson)"
            )
    if len(rates) > 1:
        lines.append(f"average win rate of {a}: {sum(rates) / len(rates):.1%} (ties count half)")
    between = agreement(votes)
    if between.same is None:
        lines.append("agreement: no question was answered by two raters yet")
    else:
        alpha = "undefined, all chose alike" if between.alpha is None else f"{between.alpha:.3f}"
        lines.append(
            f"agreement: Krippendorff's alpha {alpha}; two raters chose alike in {between.same:.1%} "
            f"({between.questions} questions with two or more)"
        )
    per_rater = Counter(vote.rater for vote in votes)
    lines.append("votes: " + ", ".join(f"{name} {count}" for name, count in sorted(per_rater.items())))
    return lines

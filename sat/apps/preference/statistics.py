"""What votes say: win rates with their uncertainty, and how far raters agree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sat.apps.preference.votes import Vote

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
    """How A did. ``half`` counts a tie as half a win, ``decided`` leaves ties out (None: all are ties).

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
    counts = _by_prompt(votes)
    decided = total.wins + total.losses
    return Outcome(
        tally=total,
        half=(total.wins + total.ties / 2) / total.total,
        half_interval=_bootstrap(counts, lambda n: (n[:, 0] + n[:, 1] / 2) / n.sum(1), seed),
        decided=total.wins / decided if decided else None,
        decided_interval=_bootstrap(counts, _decided, seed) if decided else None,
        wilson=wilson(total.wins, decided) if decided else None,
        prompts=len(counts),
    )


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a share. Source: Wilson 1927."""
    share, square = successes / trials, Z95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = Z95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def _by_prompt(votes: Sequence[Vote]) -> NDArray[np.int64]:
    """(prompts, 3): wins, ties and losses; a pair's name begins with the number of its prompt."""
    grouped: dict[str, list[Vote]] = {}
    for vote in votes:
        grouped.setdefault(vote.pair.partition("_")[0], []).append(vote)
    return np.array([tally(group) for group in grouped.values()], dtype=np.int64)


def _decided(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    decided = counts[:, 0] + counts[:, 2]
    shares: NDArray[np.float64] = counts[decided > 0, 0] / decided[decided > 0]
    return shares


def _bootstrap(
    counts: NDArray[np.int64], share: Callable[[NDArray[np.int64]], NDArray[np.float64]], seed: int
) -> Interval:
    """The middle 95 % of ``share`` over draws of as many prompts with replacement (percentile bootstrap)."""
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
    questions = list(dict.fromkeys(vote.question for vote in votes))
    lines, rates = [f"{a} against {b}"], []
    for question in questions:
        own = [vote for vote in votes if vote.question == question]
        found = outcome(own)
        rates.append(found)
        lines += [f"{question}: {line}" for line in _told(found, a)]
    if len(rates) > 1:
        average = sum(one.half for one in rates) / len(rates)
        lines.append(f"average win rate of {a}: {average:.1%} (ties count half)")
    lines.append(_agreement_line(votes))
    per_rater = Counter(vote.rater for vote in votes)
    lines.append("votes: " + ", ".join(f"{name} {count}" for name, count in sorted(per_rater.items())))
    return lines


def _told(found: Outcome, a: str) -> list[str]:
    counts = found.tally
    lines = [
        f"{a} won {counts.wins}, tied {counts.ties}, lost {counts.losses} of {counts.total} votes on "
        f"{found.prompts} prompts",
        f"win rate {found.half:.1%} {_range(found.half_interval)}, ties counting half",
    ]
    if found.decided is not None and found.decided_interval is not None and found.wilson is not None:
        lines.append(
            f"win rate {found.decided:.1%} {_range(found.decided_interval)} without ties; "
            f"{_range(found.wilson)} if votes on one prompt were independent (Wilson)"
        )
    return lines


def _range(interval: Interval) -> str:
    return f"[{interval.low:.1%}, {interval.high:.1%}]"


def _agreement_line(votes: Sequence[Vote]) -> str:
    found = agreement(votes)
    if found.same is None:
        return "agreement: no question was answered by two raters yet"
    alpha = "undefined, all chose alike" if found.alpha is None else f"{found.alpha:.3f}"
    return (
        f"agreement: Krippendorff's alpha {alpha}; two raters chose alike in {found.same:.1%} "
        f"({found.questions} questions with two or more)"
    )

"""Timing on a machine that is not alone: interleaved, warmed up, disturbed samples left out.

Variants take turns, forwards and then backwards, so that drift hits all alike. A sample counts only if other
processes had little of the processor meanwhile (Linux: ``/proc/stat``); elsewhere all count. What is compared
are medians within one run.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

Work = Callable[[], object]


class Sample(NamedTuple):
    """Wall seconds of one call, processor seconds, and whether the machine was ours meanwhile."""

    seconds: float
    cpu: float
    clean: bool


Take = Callable[[], Sample]

OTHERS = 0.1
"""Share of all cores that others may take during a sample that counts."""
STEADY = 0.02
"""Warm-up ends when two medians in a row differ by less."""
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: median, 10th and 90th percentile of the samples that count.

    ``cpu``: median processor seconds of all samples, which others' work hardly changes.
    """

    median: float
    low: float
    high: float
    cpu: float
    kept: int
    disturbed: int  # samples left out

    def plain(self) -> dict[str, Any]:
        """For the result file."""
        return asdict(self)


def compare(
    variants: Mapping[str, Take], *, rounds: int = 9, seconds: float = 60.0, warm: float = 15.0
) -> dict[str, Timing]:
    """Timings of ``variants`` in ``rounds`` turns, or as many as ``seconds`` allow (at least 3).

    ``warm``: seconds a variant is warmed up at most, after its first call.
    """
    names = list(variants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for name in names:
        _warm(variants[name], warm)
    began = time.perf_counter()
    for turn in range(3 * rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            samples[name].append(variants[name]())
        enough = min(sum(one.clean for one in taken) for taken in samples.values()) >= rounds
        if enough or (turn >= 2 and time.perf_counter() - began > seconds):
            break
    return {name: timing(taken) for name, taken in samples.items()}


def sample(work: Work, synchronize: Callable[[], None] = lambda: None, calls: int = 1) -> Sample:
    """One call of ``work``, on the mean of several where ``calls`` are asked for."""
    synchronize()
    busy, own, began = _busy(), _own(), time.perf_counter()
    for _ in range(calls):
        work()
    synchronize()
    took, used = time.perf_counter() - began, _own() - own
    others = _busy() - busy - used
    clean = others <= OTHERS * took * (os.cpu_count() or 1) + 0.02  # two ticks of the clock
    return Sample(took / calls, used / calls, clean)


def calls_for(first: Sample, seconds: float = 0.1) -> int:
    """Calls that make a sample of ``seconds``: after a pause a single short one is mostly cold caches."""
    return max(1, min(50, round(seconds / max(first.seconds, 1e-4))))


def timing(taken: Sequence[Sample]) -> Timing:
    """What the samples come to; all of them where none was undisturbed."""
    clean = sorted(one.seconds for one in taken if one.clean)
    values = clean or sorted(one.seconds for one in taken)
    edge = (len(values) - 1) // 10
    cpu = statistics.median(one.cpu for one in taken)
    return Timing(
        statistics.median(values), values[edge], values[-1 - edge], cpu, len(clean), len(taken) - len(clean)
    )


def _warm(take: Take, limit: float) -> None:
    """Take samples until two medians of three agree, or ``limit`` seconds have passed."""
    take()
    began, before = time.perf_counter(), 0.0
    while time.perf_counter() - began < limit:
        now = statistics.median(take().seconds for _ in range(3))
        if abs(now - before) <= STEADY * now:
            return
        before = now


def _busy() -> float:
    """Seconds that all processors together have been busy, stolen time included; 0 where it is not told."""
    if not _STAT.is_file():
        return 0.0
    with _STAT.open() as file:
        user, nice, system, _, _, irq, soft, steal = (int(part) for part in file.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Processor seconds of this process and its finished children."""
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def peak_rss(*, children: bool = False) -> float:
    """Peak resident memory in MB of this process, or of the largest of its finished ``children``."""
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

"""A torch trace of a few training steps, and the longest stretches in which no work was done."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from sat.parallel.heartbeat import current

log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps before the traced ones: first ones compile, measure and fill caches."""
SHOWN = 3  # gaps that are told
_PHASE = "train: "


class Span(NamedTuple):
    """Time in which something ran, in microseconds of the profiler's clock."""

    start: float
    end: float
    name: str


class Gap(NamedTuple):
    """Time without work between two pieces of it, and the phase of the step that most of it lies in."""

    start: float
    end: float
    after: str
    before: str
    phase: str

    def told(self, whole: float) -> str:
        """A line; ``whole`` is the time of all steps."""
        length = self.end - self.start
        between = f"between {self.after or 'the start'} and {self.before or 'the end'}"
        return f"{length / 1e3:.2f} ms ({length / whole:.1%}) in {self.phase!r}, {between}"


def gaps(work: Sequence[Span], phases: Sequence[Span]) -> list[Gap]:
    """The stretches of the time of ``phases`` that no span of ``work`` covers, longest first."""
    if not phases:
        return []
    start, end = min(span.start for span in phases), max(span.end for span in phases)
    found: list[Gap] = []
    reached, after = start, ""

    def gap(begin: float, until: float, after: str, before: str) -> Gap:
        inside = max(phases, key=lambda span: min(span.end, until) - max(span.start, begin))
        return Gap(begin, until, after, before, inside.name)

    for span in sorted(work):
        if span.end <= start or span.start >= end:
            continue
        if span.start > reached:
            found.append(gap(reached, span.start, after, span.name))
        if span.end > reached:
            reached, after = span.end, span.name
    if reached < end:
        found.append(gap(reached, end, after, ""))
    return sorted(found, key=lambda gap: gap.start - gap.end)


class Trace:
    """Traces the steps after a warm-up into ``folder``, once; :meth:`around` each step of a training.

    Work is that of the accelerator, on a CPU that of torch's operators in any thread. Phases are those that
    the loop marks: reading a batch, forward and backward pass, optimizer, and what follows.
    """

    def __init__(self, folder: Path, steps: int, rank: int, *, accelerator: bool) -> None:
        self.folder, self.steps, self.rank, self.accelerator = folder, steps, rank, accelerator
        self._seen = 0
        self._profile: Any = None
        self._phase: Any = None

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around one step."""
        if self._seen == WARM_UP:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.accelerator else [])]
            self._profile = profile(activities=kinds)
            self._profile.__enter__()
        if self._profile is None:
            self._seen += 1
            yield
            return
        with self._marked():
            yield
        self._seen += 1
        if self._seen == WARM_UP + self.steps:
            self._profile.__exit__(None, None, None)
            self._write(self._profile)
            self._profile = None

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Let every mark of the loop begin a phase of the trace."""
        watch = current()
        mark = watch.mark

        def phase(doing: str, place: int | None = None) -> None:
            self._end()
            self._phase = record_function(_PHASE + doing.rpartition(": ")[2])
            self._phase.__enter__()
            mark(doing, place)

        watch.mark = phase  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._end()
            watch.mark = mark  # type: ignore[method-assign]

    def _end(self) -> None:
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None

    def _write(self, made: Any) -> None:
        """Write the trace, and tell the longest gaps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"trace_{self.rank:05d}.json.gz"
        made.export_chrome_trace(str(file))
        work, phases = list[Span](), list[Span]()
        for event in made.events():
            span = Span(event.time_range.start, event.time_range.end, event.name)
            on_cpu = event.device_type == DeviceType.CPU
            if event.name.startswith(_PHASE):
                if on_cpu:
                    phases.append(span._replace(name=event.name.removeprefix(_PHASE)))
            elif on_cpu is not self.accelerator and (self.accelerator or event.name.startswith("aten::")):
                work.append(span)
        found = gaps(work, phases)
        if not phases:
            log.warning("train.profile: the trace has no phases; %s holds what there is", file)
            return
        whole = max(span.end for span in phases) - min(span.start for span in phases)
        idle = sum(gap.end - gap.start for gap in found)
        log.info(
            "profile of %d steps: %s, %.1f ms a step, %.1f%% of it without work; the longest gaps:",
            self.steps, file, whole / 1e3 / self.steps, 100 * idle / whole,
        )  # fmt: skip
        for gap in found[:SHOWN]:
            log.info("  %s", gap.told(whole))

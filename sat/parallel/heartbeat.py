"""Watch over the ranks of a run: a thread that sends this rank's heartbeat and checks the others'.

Three things end a run, each with the rank and what it did last: a rank that reports a failure; one that is
dead or suspended, told by its missing heartbeat; one that is stuck, told by a heartbeat without progress.
The main thread may wait in a collective for any time meanwhile: it is not asked, and the process is ended
from this thread where it does not leave by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, TypeVar

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from sat.errors import LostRankError, ReportedError
from sat.util.ending import FAILED, INTERRUPTED, ending
from sat.util.host import alive, machine, process_fact
from sat.util.log import describe

_T = TypeVar("_T")

SILENCE = 15.0
"""Seconds without a heartbeat after which a rank is dead; ``parallel.timeout`` where that is less."""
GRACE = 2.0
"""Seconds that the main thread has to leave by itself."""
WATCHED = 64
"""Ranks that one rank watches, those that follow it: all of them are watched by someone."""


@dataclass
class _Other:
    """Another rank as seen from here; times are of this process's monotonic clock."""

    beat: int = -1
    heard: float = 0.0  # last new heartbeat
    marks: int = -1
    moved: float = 0.0  # last new mark, or long section
    doing: str = "starting"
    long: bool = True
    done: bool = False
    pid: int = 0
    machine: str = ""
    gone: float = 0.0  # since its process is not there


class Heartbeat:
    """Watches ``world`` ranks over ``store``; without one, or alone, every method does nothing.

    ``silence`` and ``stall`` are in seconds: without a heartbeat, and without a mark. A rank is in a long
    section, where it cannot stall, until :meth:`ready`. ``end`` ends the process in place of
    :meth:`sat.util.ending.Ending.hard`.
    """

    def __init__(  # noqa: PLR0913 - places in tests
        self,
        rank: int,
        world: int,
        silence: float = SILENCE,
        stall: float = 600.0,
        store: Store | None = None,
        end: Callable[[LostRankError], None] | None = None,
    ) -> None:
        self.rank, self.world, self.silence, self.stall = rank, world, silence, stall
        self.error: LostRankError | None = None
        self._store = store if world > 1 else None
        self._end = end or _end
        self._doing, self._marks, self._long, self._started = "starting", 0, 1, False
        self._beat, self._done = 0, False
        self._interval = min(1.0, silence / 6)
        now = time.monotonic()
        self._talked = self._looked = self._moved = now
        count = min(world - 1, WATCHED)
        self._others = {(rank + i) % world: _Other(heard=now, moved=now) for i in range(1, count + 1)}
        self._left = threading.Event()
        if self._store is not None:
            for name, work in (("heartbeat", self._talk), ("watch", self._watch)):
                threading.Thread(target=work, name=name, daemon=True).start()

    # -- called by the main thread

    def mark(self, doing: str, place: int | None = None) -> None:
        """Note progress, and what this rank does now; raises if the run is lost.

        Ranks that work in step count alike: of those that stand still, the one with the lowest count is
        waited for by the others. ``place`` sets the count anew.
        """
        self._doing = doing
        self._marks = self._marks + 1 if place is None else place
        if self.error is not None:
            raise self.error

    def starting(self) -> None:
        """Begin the long section that every rank begins in: loading, building, a first step."""
        if self._started:
            self._started, self._long = False, self._long + 1

    def ready(self, doing: str | None = None) -> None:
        """End it, and note ``doing`` as progress."""
        if not self._started:
            self._started, self._long = True, self._long - 1
        if doing is not None:
            self.mark(doing)

    @contextmanager
    def long(self, doing: str) -> Iterator[None]:
        """Section that may take any time: it cannot stall, on this rank and those that wait for it."""
        before = self._doing
        self._long += 1
        self.mark(doing)
        try:
            yield
        finally:
            self._long -= 1
            self._doing = before
            self._marks += 1

    def fail(self, error: BaseException) -> None:
        """Report that ``error`` ended this rank, unless another was first; never raises.

        The others stop with the same exit code.
        """
        interrupted = isinstance(error, KeyboardInterrupt)
        what = f"was stopped ({error or 'Ctrl-C'})" if interrupted else f"failed: {describe(error)}"
        code = INTERRUPTED if interrupted else getattr(error, "exit_code", FAILED)
        self._report(f"rank {self.rank} {what}", code)

    def abort(self, line: str, patience: float | None = None) -> NoReturn:
        """Raise because an exchange with another rank broke off, as ``line`` says.

        A failing rank reports its reason before it leaves, and a dead one is found by its missing heartbeat:
        wait ``patience`` seconds for it (as long as that can take).
        """
        until = time.monotonic() + (self.silence + 2 if patience is None else patience)
        while self._store is not None and self.error is None and time.monotonic() < until:
            time.sleep(0.05)
        if self.error is not None:
            raise self.error
        lost = LostRankError(line)
        self.fail(lost)
        raise lost

    def explain(self) -> None:
        """Raise the error of a rank that has ended without a word, if there is one.

        torchrun stops those that are left at once, before the watch has found why.
        """
        until = time.monotonic() + 3 * self._interval + 1
        while self.error is None and time.monotonic() < until and any(map(_gone, self._others.values())):
            time.sleep(0.05)
        if self.error is not None and self.error.exit_code != INTERRUPTED:
            raise self.error

    def finish(self) -> None:
        """Report that this rank is done, and wait for all others as long as they live; then stop watching."""
        if self._store is None:
            return
        with self.long("waiting for the other ranks to finish"):
            self._done = True
            self._ask(lambda store: store.add("done", 1))
            self._wait(lambda: self._count("done") >= self.world)
            # The rank that serves the store leaves last: the others must have seen that all are done.
            self._ask(lambda store: store.add("left", 1))
            self._left.set()  # nobody is dead any more
            until = time.monotonic() + 10
            while self.rank == 0 and self._count("left") < self.world and time.monotonic() < until:
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop watching: this process leaves."""
        self._left.set()

    def _wait(self, over: Callable[[], bool]) -> None:
        pause = 0.01
        while not over():
            if self.error is not None:
                raise self.error
            time.sleep(pause)
            pause = min(0.5, pause * 1.5)
        if self.error is not None:
            raise self.error

    # -- the two threads: one talks to the store, which may block; the other decides

    def _talk(self) -> None:
        """Send this rank's heartbeat and read the others', again and again."""
        unknown = set(self._others)
        try:
            while not self._left.is_set():
                self._beat += 1
                state = [self._beat, self._marks, self._long > 0, self._done, self._doing]
                text = json.dumps([*state, os.getpid(), machine()])
                self._ask(partial(_put, f"rank{self.rank}", text))
                unknown -= {one for one in unknown if self._ask(partial(_has, f"rank{one}"))}
                known = [one for one in self._others if one not in unknown]
                found = self._ask(partial(_get, [f"rank{one}" for one in known])) if known else []
                self._hear(dict(zip(known, map(json.loads, found), strict=True)))
                if self._ask(partial(_has, "failed")):
                    by, line, code = json.loads(self._ask(partial(_get, ["failed"]))[0])
                    if by == self.rank:
                        self._lost(LostRankError(line))
                    else:
                        self._lost(ReportedError(f"{line}; this rank stops too", code))
                    return
                self._talked = time.monotonic()
                self._left.wait(self._interval)
        except LostRankError as error:
            self._left.wait(1.0)  # torchrun's end and this process's own are told otherwise
            self._lost(error)

    def _hear(self, states: dict[int, list[int]]) -> None:
        """Note what other ranks said of themselves."""
        now = time.monotonic()
        for rank, (beat, marks, long, done, doing, pid, place) in states.items():
            other = self._others[rank]
            if beat != other.beat:
                other.heard = now
            if marks != other.marks or long or done:
                other.moved = now
            other.beat, other.marks, other.long, other.done = beat, marks, bool(long), bool(done)
            other.doing, other.pid, other.machine = str(doing), pid, str(place)

    def _watch(self) -> None:
        """Look for ranks that are dead or stuck, whatever the main thread and the store do."""
        marks = -1
        while not self._left.wait(min(0.5, self._interval)):
            now = time.monotonic()
            if now - self._looked > max(2.0, self.silence / 4):  # this process itself stood still
                for other in self._others.values():
                    other.heard = other.moved = now
                self._talked = self._moved = now
            # Nobody is stuck who may wait for a rank in a long section.
            if self._long and not self._done or any(o.long and not o.done for o in self._others.values()):
                for other in self._others.values():
                    other.moved = now
                self._moved = now
            if marks != self._marks:
                marks, self._moved = self._marks, now
            self._looked = now
            line = self._unanswered(now) or self._dead(now) or self._stuck(now)
            if line and self.error is None:
                self._lost(LostRankError(line))
            if self.error is not None:
                return

    def _unanswered(self, now: float) -> str:
        """A line about the store's server where it does not answer, else empty."""
        if now - self._talked <= self.silence:
            return ""
        return (
            f"the process that serves the ranks' common store (rank 0, or torchrun) has not answered for "
            f"{self.silence:g} s: it is suspended or cut off. Run again with --resume"
        )

    def _dead(self, now: float) -> str:
        """A line about a rank that has ended or is suspended, else empty; the others are told."""
        for rank, other in self._others.items():
            if other.done:
                continue
            here, gone = other.machine == machine(), _gone(other)
            other.gone = (other.gone or now) if gone else 0.0
            silent = self._talked - other.heard > self.silence
            if silent and here and not gone and process_fact(other.pid, 0) in ("R", "S", "D"):
                continue  # it runs, but its threads do not come to it
            # A rank that failed has reported it before it left: hear that first.
            if (gone and self._talked > other.gone + self._interval) or (silent and not gone):
                how = "has ended" if gone else f"gave no sign of life for {self.silence:g} s"
                what = "" if gone else "; it has died or is suspended"
                line = (
                    f"rank {rank} of {self.world} {how} (last: {other.doing}){what}. Run again with --resume"
                )
                self._report(line)
                return line
        return ""

    def _stuck(self, now: float) -> str:
        """A line about a rank that stands still for ``stall`` seconds, else empty; the others are told.

        Of several it is the one that the others wait for, or all that did the same last.
        """
        still = {
            rank: (other.marks, other.doing)
            for rank, other in self._others.items()
            if not other.done and now - other.moved > self.stall - 3 * self._interval
        }
        if not any(now - self._others[rank].moved > self.stall for rank in still):
            return ""
        if not self._done and now - self._moved > self.stall - 3 * self._interval:
            still[self.rank] = (self._marks, self._doing)
        first = min(still.values())
        names = ", ".join(str(rank) for rank in sorted(still) if still[rank][0] == first[0])
        line = (
            f"rank {names} of {self.world} made no progress for {self.stall:g} s (parallel.stall; last: "
            f"{first[1]}). Run again with --resume"
        )
        self._report(line)
        return line

    def _lost(self, error: LostRankError) -> None:
        """Let the main thread raise ``error`` at its next mark, and end the process if it does not."""
        if self.error is None and not self._left.is_set():
            self.error = error
            if not self._left.wait(GRACE):
                self._end(error)

    def _report(self, line: str, code: int = FAILED) -> None:
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # nobody left to tell
            self._store.compare_set("failed", "", json.dumps([self.rank, line, code]))

    def _count(self, key: str) -> int:
        return int(self._ask(lambda store: store.add(key, 0)))

    def _ask(self, question: Callable[[Store], _T]) -> _T:
        assert self._store is not None, "only called with other ranks"
        try:
            return question(self._store)
        except RuntimeError as error:  # DistError and its kin
            raise LostRankError(
                f"the process that serves the ranks' common store is gone, so rank 0 or torchrun has ended: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _gone(other: _Other) -> bool:
    """True if the process of a rank that was not done is no longer on this machine."""
    return not other.done and other.machine == machine() and not alive(other.pid)


def _put(key: str, text: str, store: Store) -> None:
    store.set(key, text)


def _has(key: str, store: Store) -> bool:
    return bool(store.check([key]))


def _get(keys: list[str], store: Store) -> list[bytes]:
    """Values of ``keys``, which are there."""
    found: list[bytes] = store.multi_get(keys)
    return found


def _end(error: LostRankError) -> None:
    ending.hard(str(error), error.exit_code, own=not isinstance(error, ReportedError))


_current: Heartbeat | None = None
_count = 0


def watch(rank: int, world: int, store: Store, silence: float, stall: float) -> Heartbeat:
    """Watch this process's ranks from now on, over a connection of its own to the server of ``store``."""
    global _current, _count
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, TCPStore):  # a wait of the main thread's would hold up the others on one connection
        store = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    _count += 1  # a process may run several times, as its other ranks do
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _current = Heartbeat(
        rank, world, min(silence, SILENCE), stall, PrefixStore(f"watch/{attempt}/{_count}", store)
    )
    return _current


def unwatch() -> None:
    """Stop the watch over this process's ranks."""
    global _current
    current().stop()
    _current = None


def current() -> Heartbeat:
    """Watch over this process's ranks; one that does nothing for a process alone."""
    global _current
    if _current is None:
        _current = Heartbeat(0, 1)
    return _current

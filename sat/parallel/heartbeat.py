"""Heartbeats of ranks that work independently: signs of life, failures, and a wait for all at the end.

A barrier has one time limit for everything. Here a rank may take any time as long as it sends heartbeats:
only a rank without one for ``timeout`` seconds, or one that reports a failure, ends the run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import _get_default_store

from sat.errors import LostRankError, ReportedError

_T = TypeVar("_T")


class Heartbeat:
    """Sends this rank's heartbeats through the store, and raises when another rank fails or is silent.

    ``timeout`` is in seconds. Without a process group, or alone in it, every method does nothing.
    """

    def __init__(self, rank: int, world: int, timeout: float, store: Store | None = None) -> None:
        self._rank = rank
        self._world = world
        self._timeout = timeout
        self._last_beat = 0.0
        self._store: Store | None = None
        if world > 1:
            base = store if store is not None else _get_default_store()
            self._store = PrefixStore("heartbeat", base)

    def beat(self) -> None:
        """Send a heartbeat, once a second at most; raises if another rank has failed."""
        now = time.monotonic()
        if self._store is None or now - self._last_beat < 1.0:
            return
        self._last_beat = now
        self._ask(lambda store: store.add(f"beat{self._rank}", 1))
        self._raise_failure()

    def fail(self, reason: str) -> None:
        """Report that this rank failed, unless another was first; never raises."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # nobody left to tell
            self._store.compare_set("failed", "", f"rank {self._rank} failed: {reason}")

    def abort(self, line: str, patience: float = 2.0) -> NoReturn:
        """Raise because an exchange with another rank broke off, as ``line`` says.

        A failing rank reports its reason before it leaves: wait ``patience`` seconds for it.
        """
        until = time.monotonic() + patience
        while self._store is not None and time.monotonic() < until:
            self._raise_failure()
            time.sleep(0.05)
        self.fail(line)
        raise LostRankError(line)

    def finish(self) -> None:
        """Report that this rank is done, and wait for all others as long as their heartbeats come."""
        if self._store is None:
            return
        self._ask(lambda store: store.add(f"end{self._rank}", 1))
        others = [rank for rank in range(self._world) if rank != self._rank]
        self._wait(lambda: [r for r in others if not self._count(f"end{r}")])
        self._raise_failure()
        # The rank that serves the store leaves last: the others must have seen that all are done.
        self._ask(lambda store: store.add(f"left{self._rank}", 1))
        if self._rank == 0:
            self._wait(lambda: [r for r in others if not self._count(f"left{r}")])

    def _wait(self, waiting: Callable[[], list[int]]) -> None:
        """Wait until ``waiting`` names no rank; raises when none of them sends heartbeats any more."""
        moved = time.monotonic()
        seen: dict[int, int] = {}
        pause = 0.01
        while left := waiting():
            self._raise_failure()
            beats = {rank: self._count(f"beat{rank}") for rank in left}
            if beats != seen:
                seen, moved = beats, time.monotonic()
            elif time.monotonic() - moved > self._timeout:
                names = ", ".join(map(str, left))
                raise LostRankError(
                    f"rank {names} of {self._world} gave no sign of life for {self._timeout:g} s "
                    f"(parallel.timeout); it has died or hangs. Run again with --resume"
                )
            time.sleep(pause)
            pause = min(0.5, pause * 1.5)

    def _raise_failure(self) -> None:
        """Raise if another rank has reported a failure."""
        if self._ask(lambda store: store.check(["failed"])):
            reason = self._ask(lambda store: store.get("failed")).decode()
            if not reason.startswith(f"rank {self._rank} "):
                raise ReportedError(f"{reason}; this rank stops too")

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

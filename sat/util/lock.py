"""One writer a folder: lock files that work on shared file systems, and are taken over from the dead.

A lock is a small file that is made whole under another name and appears by ``link``, which succeeds for one
process only, on NFS too. Its owner touches it every few seconds. The owner is dead if its process is gone (on
the same machine) or if the file was not touched for long (from another one); clocks are never compared, as
the file system dates all files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from sat.errors import UserError
from sat.util.ending import ending
from sat.util.host import TEMPORARY, alive, file_clock, machine, process_fact

log = logging.getLogger(__name__)

REFRESH, STALE = 10.0, 90.0
"""Seconds between two touches, and without one after which an owner on another machine is dead."""


class BusyError(UserError, RuntimeError):
    """The folder has a writer already."""


@dataclass(frozen=True)
class Owner:
    """Process that holds a lock. ``machine`` is equal where pids can be compared; ``born`` tells reused pids.

    ``purpose`` is compared by those who may write side by side.
    """

    token: str
    host: str
    machine: str
    pid: int
    born: str
    job: str | None  # SLURM's
    restart: int  # of the job
    started: str
    purpose: str = ""

    def __str__(self) -> str:
        job = "" if self.job is None else f", SLURM job {self.job}"
        return f"process {self.pid} on {self.host}{job}, started {self.started}"

    @property
    def state(self) -> bool | None:
        """True if it runs, False if it is dead, None if this process cannot know."""
        job, restart = _job()
        if self.job is not None and self.job == job and self.restart < restart:
            return False  # SLURM has ended it before it started this one
        if self.machine != machine():
            return None
        return alive(self.pid) and self.born == process_fact(self.pid, 19)


def _job() -> tuple[str | None, int]:
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID"), int(count) if count.isdigit() else 0


class Lock:
    """Lock file at ``path``, whose folder exists; a context manager that holds it.

    ``what`` names the folder in messages. Entering raises :class:`BusyError` if another live process holds
    the lock: at once on the same machine, else after seeing its file touched; ``STALE`` seconds without that
    mean that it is dead. ``lost`` becomes true if another process has taken the lock over meanwhile.
    """

    def __init__(self, path: Path, what: str, purpose: str = "") -> None:
        self.path, self.what = path, what
        (job, restart), pid = _job(), os.getpid()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.owner = Owner(
            uuid4().hex[:12], socket.gethostname(), machine(), pid, process_fact(pid, 19), job, restart, now,
            purpose,
        )  # fmt: skip
        self.lost = self._held = False
        self._over = threading.Event()

    def __enter__(self) -> Lock:
        if self._held:
            return self
        while not self._link(self.path):
            seen = read(self.path)
            if seen is None:  # gone in this moment
                continue
            if runs(self.path, seen, self.what):
                raise BusyError(
                    f"{self.what} is being written by another run ({seen}): wait for it to end, stop it, or "
                    f"choose another --output-dir"
                )
            self._take_over(seen)
        self._held = True
        ending.releases.append(self.release)
        threading.Thread(target=self._refresh, name="lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not this process's any more."""
        self._over.set()
        with contextlib.suppress(ValueError):
            ending.releases.remove(self.release)
        held = read(self.path)
        if held is not None and held.token == self.owner.token:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def check(self) -> None:
        """Raise :class:`BusyError` if another process has taken the lock over."""
        if self.lost:
            raise BusyError(
                f"{self.what} was taken over by another run while this one gave no sign of life (suspended, "
                f"or cut off from the file system): it stops here"
            )

    def _link(self, path: Path) -> bool:
        """Make ``path`` with this owner in it, unless it exists; true if it was made."""
        draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}{TEMPORARY}")
        text = json.dumps(asdict(self.owner))
        try:
            draft.write_text(text)
            try:
                os.link(draft, path)
                return True
            except FileExistsError:
                return draft.stat().st_nlink == 2  # NFS: it was made, and the first answer lost
            except OSError:  # no links on this file system
                try:
                    with path.open("x") as file:
                        file.write(text)
                    return True
                except FileExistsError:
                    return False
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()

    def _take_over(self, dead: Owner) -> None:
        """Remove the lock of ``dead``, as the only process that may: the one that holds its marker."""
        marker = self.path.with_name(f"{self.path.name}.{dead.token or 'old'}")
        if not self._link(marker):
            taker = read(marker)
            if taker is not None and not runs(marker, taker, self.what):
                with contextlib.suppress(OSError):
                    marker.unlink()
            time.sleep(0.05)
            return
        try:
            now = read(self.path)
            if now is not None and now.token == dead.token:
                log.warning("%s: taken over from a run that is gone (%s)", self.what, dead)
                self.path.unlink()
        finally:
            with contextlib.suppress(OSError):
                marker.unlink()

    def _refresh(self) -> None:
        """Touch the lock now and then, and notice that it is another's."""
        while not self._over.wait(REFRESH):
            with contextlib.suppress(OSError):
                held = read(self.path)
                if self._over.is_set():
                    return
                if held is None or held.token != self.owner.token:
                    self.lost = True
                    return
                os.utime(self.path)


def read(path: Path) -> Owner | None:
    """Owner that the lock file at ``path`` names, None without such a file.

    A file that cannot be understood has an owner that is known by its age alone.
    """
    try:
        with path.open() as file:  # opening makes NFS ask the server
            return Owner(**json.load(file))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return Owner("", "another machine", "", 0, "", None, 0, "at an unknown time")


def runs(path: Path, owner: Owner, what: str) -> bool:
    """True if the ``owner`` of the lock file at ``path`` is alive; may take ``STALE`` seconds to find out."""
    if owner.state is not None:
        return owner.state
    first, until, told = _touched(path), time.monotonic() + STALE, False
    if first is None or file_clock(path.parent) - first > STALE:
        return False
    while time.monotonic() < until:
        if not told:
            log.info("%s: waiting up to %.0f s for a sign of life of %s", what, STALE, owner)
            told = True
        time.sleep(min(1.0, STALE / 5))
        last, now = _touched(path), read(path)
        if last is None or now is None or now.token != owner.token:
            return False
        if last != first:
            return True
    return False


def _touched(path: Path) -> float | None:
    """Time of the last touch in the file system's clock."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


@contextmanager
def share_lock(folder: Path, part: int, parts: int, purpose: str, what: str) -> Iterator[Lock]:
    """Hold the lock of share ``part`` of ``parts`` of ``folder``; raises :class:`BusyError`.

    Shares with the same ``purpose`` and without a common item (K, K + N, K + 2 N, …) write side by side.
    """
    mutex, until = Lock(folder / ".writers.lock", what), time.monotonic() + 2 * STALE
    while True:  # held for milliseconds
        try:
            mutex.__enter__()
            break
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(random.uniform(0.02, 0.2))
    lock = Lock(folder / f".writer-{part}-of-{parts}.lock", what, purpose)
    with mutex:
        for path in folder.glob(".writer-*.lock"):
            match, other = re.fullmatch(r"\.writer-(\d+)-of-(\d+)\.lock", path.name), read(path)
            if match is None or other is None:
                continue
            common = math.gcd(int(match[2]), parts)
            overlaps = int(match[1]) % common == part % common
            if (not overlaps and other.purpose == purpose) or not runs(path, other, what):
                continue
            others = "this share" if overlaps and parts > 1 else "pictures"
            if not overlaps:
                others = f"share {match[1]}/{match[2]} of another config or other prompts"
            raise BusyError(
                f"{what}: another run draws {others} here ({other}): wait for it to end, stop it, or choose "
                f"another --output-dir"
            )
        lock.__enter__()
    with lock:
        yield lock

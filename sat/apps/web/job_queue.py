"""A bounded queue of jobs before the one drawing thread; other threads watch and cancel them."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Literal, NamedTuple

from torch import Tensor

from sat.apps.web.request import GenerationRequest

log = logging.getLogger(__name__)

State = Literal["waiting", "drawing", "done", "failed", "cancelled"]


class QueueFullError(RuntimeError):
    """The queue takes no more jobs."""


class QueueClosedError(RuntimeError):
    """The server is closing."""


class CancelledError(Exception):
    """Raised inside a job that was cancelled."""


class Batch(NamedTuple):
    """Drawing of one job together with others of equal ``key``: ``most`` pictures at once, it has ``images``.

    ``draw(jobs)`` sets the pictures of each job.
    """

    key: Hashable
    images: int
    most: int
    request: GenerationRequest
    draw: Callable[[Sequence[Job]], None]


@dataclass(frozen=True)
class View:
    """Progress of a job. ``latents`` (b, C, h, w): the pictures as predicted at the last step."""

    state: State
    step: int = 0
    steps: int = 0
    latents: Tensor | None = None


class Job:
    """One request in the queue. The drawing thread calls :meth:`step`; other threads watch and may cancel."""

    def __init__(self, work: Callable[[Job], list[Path]], steps: int, batch: Batch | None = None) -> None:
        self.work, self.batch = work, batch
        self.begins = 0.0  # place in the queue, in steps of all clients
        self.pictures: list[Path] = []
        self.expected: list[Path] = []  # files of the last stage begun, each there once its picture is
        self.kept: list[Path] = []  # of them, those finished by earlier runs of this job
        self.origins: dict[Path, Path] = {}  # enlarged pictures -> the small ones they are of
        self.error: BaseException | None = None
        self._steps, self._done = steps, 0
        self._latents: Tensor | None = None
        self._state: State = "waiting"
        self._unwanted = Event()
        self._over = Event()

    def view(self) -> View:
        """Its progress."""
        return View(self._state, self._done, self._steps, latents=self._latents)

    @property
    def steps(self) -> int:
        """Steps that are expected of it."""
        return self._steps

    @property
    def is_over(self) -> bool:
        """True once it is done, failed or cancelled."""
        return self._over.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is over, at most ``seconds``; True if it is."""
        return self._over.wait(seconds)

    def cancel(self) -> None:
        """End it before its next step, or before it begins."""
        self._unwanted.set()

    @property
    def is_unwanted(self) -> bool:
        """True once it was cancelled."""
        return self._unwanted.is_set()

    def step(self, done: int, of: int, latents: Tensor) -> None:
        """A sampler's callback: count, and keep the prediction on its device, without waiting for it."""
        self._done += 1
        self._latents = latents
        self.check()

    def correct(self, steps: int) -> None:
        """Add to the number of steps that were expected: pictures that are changed take fewer."""
        self._steps += steps

    def check(self) -> None:
        """Raise :class:`CancelledError` once it was cancelled."""
        if self._unwanted.is_set():
            raise CancelledError

    def start(self) -> None:
        """Mark it as being drawn, from its first step on."""
        self._state, self._done = "drawing", 0

    def end(self, state: State, error: BaseException | None = None) -> None:
        """Mark it as over."""
        self.error, self._state = error, state
        self._latents = None
        self._over.set()


class JobQueue:
    """At most ``most`` waiting jobs, and the thread that runs them.

    Clients take turns by the steps that they ask for (start-time fair queuing, Goyal, Vin and Cheng 1996): a
    job begins, on a clock of steps, where its client's last one ends, or now; the earliest is next. A client
    with nothing in the queue may add a job beyond ``most``, up to twice that. Jobs of one
    :class:`Batch` key are drawn together, also from behind, as far as their pictures go through at once.
    ``prepare`` runs first, on that thread, to which a model and a device's context belong.
    """

    def __init__(self, prepare: Callable[[], object], most: int) -> None:
        self.most = most
        self._prepare = prepare
        self._ready: object = None
        self._failed: BaseException | None = None
        self._opened = Event()
        self._waiting: list[Job] = []  # in the order of arrival
        self._clock, self._ends = 0.0, dict[str, float]()  # of all, and of each client's last job
        self._clients: dict[Job, str] = {}  # of the jobs that wait
        self._current: list[Job] = []
        self._closing = False
        self.ended: Counter[State] = Counter()  # jobs by how they ended
        self.pictures, self.seconds = 0, 0.0  # drawn so far, and the time of it
        self._change = Condition()
        self._thread = Thread(target=self._work, name="drawing", daemon=True)

    def open(self) -> object:
        """Start; returns the result of ``prepare``, and raises its error."""
        self._thread.start()
        while not self._opened.wait(0.2):  # in slices, so that Ctrl-C is heard
            pass
        if self._failed is not None:
            raise self._failed
        return self._ready

    def submit(self, job: Job, client: str = "") -> Job:
        """Append ``job`` of a client; :class:`QueueFullError`, and :class:`QueueClosedError` at the end."""
        with self._change:
            if self._closing:
                raise QueueClosedError("the server is closing")
            new = client not in self._clients.values()
            if len(self._waiting) >= (2 * self.most if new else self.most):
                raise QueueFullError(
                    f"{len(self._waiting)} pictures are waiting already: try again in a moment"
                )
            job.begins = max(self._clock, self._ends.get(client, 0.0))
            self._ends[client] = job.begins + max(1, job.steps)
            self._waiting.append(job)
            self._clients[job] = client
            self._change.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel ``job``; one that waits frees its place at once."""
        job.cancel()
        with self._change:
            if job in self._waiting:
                self._take(job)
                self.ended["cancelled"] += 1
                job.end("cancelled")

    def ahead(self, job: Job) -> int:
        """Number of jobs that are drawn before ``job``."""
        with self._change:
            if job not in self._waiting:
                return 0
            return sorted(self._waiting, key=_order).index(job) + len(self._current)

    @property
    def length(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """True while a job is being drawn."""
        return bool(self._current)

    @property
    def is_alive(self) -> bool:
        """True while the drawing thread runs."""
        return self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        """True once nothing that waits will be drawn any more."""
        return self._closing or (self._opened.is_set() and not self.is_alive)

    def close(self, seconds: float = 5.0) -> None:
        """Cancel everything; wait for the drawing thread to stop, but not longer: a step may be long."""
        with self._change:
            self._closing = True
            left = [*self._waiting, *self._current]
            self._change.notify()
        for job in left:
            self.cancel(job)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            self._ready = self._prepare()
        except BaseException as error:
            self._failed = error
            return
        finally:
            self._opened.set()
        while True:
            with self._change:
                self._current = []
                while not self._waiting and not self._closing:
                    self._change.wait()
                if self._closing:
                    return
                self._current = self._next()
            began = time.monotonic()
            for job in self._current:
                job.start()
            if len(self._current) > 1 and self._current[0].batch is not None:
                try:
                    self._current[0].batch.draw(self._current)
                except BaseException:  # whose error it is shows when each is drawn by itself
                    log.debug("jobs failed together", exc_info=True)
                    for job in self._current:
                        job.start()
            for job in self._current:
                self._finish(job)
            self.seconds += time.monotonic() - began

    def _finish(self, job: Job) -> None:
        """Draw ``job`` unless its pictures are there, and end it."""
        state: State = "done"
        failure: BaseException | None = None
        try:
            job.check()
            job.pictures = job.pictures or job.work(job)
        except CancelledError:
            state = "cancelled"
        except BaseException as error:  # it ends this job alone
            log.debug("a job failed", exc_info=True)
            state, failure = "failed", error
        self.ended[state] += 1
        self.pictures += len(job.pictures)
        job.end(state, failure)

    def _next(self) -> list[Job]:
        """Take the job whose turn it is, and those that are drawn together with it."""
        first, *others = sorted(self._waiting, key=_order)
        self._clock = first.begins
        self._ends = {client: end for client, end in self._ends.items() if end > self._clock}
        taken, left = [first], 0 if first.batch is None else first.batch.most - first.batch.images
        for job in others:
            if first.batch and job.batch and job.batch.key == first.batch.key and job.batch.images <= left:
                taken.append(job)
                left -= job.batch.images
        for job in taken:
            self._take(job)
        return taken

    def _take(self, job: Job) -> None:
        self._waiting.remove(job)
        del self._clients[job]


def _order(job: Job) -> float:
    return job.begins

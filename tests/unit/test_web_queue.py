"""The queue of jobs: order, bounds, cancelling, and what one job's end means for the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest
import torch

from sat.apps.web.job_queue import Job, JobQueue, QueueClosedError, QueueFullError


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    queue = JobQueue(lambda: "ready", most=3)
    assert queue.open() == "ready"
    yield queue
    queue.close(5)
    assert not queue.is_alive


class Held:
    """A job that is being drawn until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = Event(), Event()

    def __call__(self, job: Job) -> list[Path]:
        self.begun.set()
        while not self.go.wait(0.01):
            job.step(1, 1, torch.zeros(1))
        return [Path("held.png")]


def quick(name: str) -> Job:
    return Job(lambda job: [Path(name)], 1)


def test_jobs_are_done_in_order_and_the_queue_is_bounded(queue) -> None:
    held = Held()
    first = queue.submit(Job(held, 1))
    assert held.begun.wait(5)
    waiting = [queue.submit(quick(f"{i}.png")) for i in range(3)]
    assert [queue.ahead(job) for job in [first, *waiting]] == [0, 1, 2, 3]
    with pytest.raises(QueueFullError, match="3 pictures are waiting already"):
        queue.submit(quick("one too many"))
    held.go.set()
    assert all(job.wait(5) for job in [first, *waiting])
    assert [job.pictures[0].name for job in [first, *waiting]] == ["held.png", "0.png", "1.png", "2.png"]


def test_a_cancelled_job_frees_its_place_or_ends_at_its_next_step(queue) -> None:
    held = Held()
    first = queue.submit(Job(held, 1))
    assert held.begun.wait(5)
    second, third = queue.submit(quick("second")), queue.submit(quick("third"))
    queue.cancel(second)
    assert second.is_over and second.view().state == "cancelled" and queue.length == 1
    queue.cancel(first)
    assert first.wait(5) and first.view().state == "cancelled" and first.pictures == []
    assert third.wait(5) and third.view().state == "done"


def test_an_error_ends_its_own_job_alone(queue) -> None:
    def fail(job: Job) -> list[Path]:
        raise ValueError("no such thing")

    failed = queue.submit(Job(fail, 1))
    good = queue.submit(quick("good"))
    assert failed.wait(5) and good.wait(5)
    assert failed.view().state == "failed" and str(failed.error) == "no such thing"
    assert good.view().state == "done"


def test_progress_is_counted_and_the_prediction_is_let_go(queue) -> None:
    seen = []

    def work(job: Job) -> list[Path]:
        for i in range(3):
            job.step(i + 1, 3, torch.full((1,), float(i)))
            seen.append((job.view().step, job.view().latents))
        return []

    job = queue.submit(Job(work, 3))
    assert job.wait(5)
    assert [(step, float(latents)) for step, latents in seen] == [(1, 0.0), (2, 1.0), (3, 2.0)]
    assert job.view().latents is None


def test_closing_cancels_what_is_left() -> None:
    queue, held = JobQueue(lambda: "ready", most=3), Held()
    queue.open()
    first, second = queue.submit(Job(held, 1)), queue.submit(quick("second"))
    assert held.begun.wait(5)
    queue.close(5)
    assert [first.view().state, second.view().state] == ["cancelled", "cancelled"]
    with pytest.raises(QueueClosedError, match="closing"):
        queue.submit(quick("late"))


def test_an_error_while_opening_is_raised_where_it_is_opened() -> None:
    def fail() -> str:
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        JobQueue(fail, most=1).open()

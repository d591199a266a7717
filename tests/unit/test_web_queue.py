"""The queue of jobs: order, bounds, cancelling, and what one job's end means for the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest
import torch

from sat.apps.web.job_queue import Batch, Job, JobQueue, QueueClosedError, QueueFullError
from sat.apps.web.request import GenerationRequest


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


@pytest.fixture
def long() -> Iterator[tuple[JobQueue, Event]]:
    """A queue of 60 whose first job is being drawn until the event is set."""
    queue, held = JobQueue(lambda: "ready", most=60), Held()
    queue.open()
    queue.submit(Job(held, 1), "ann")
    assert held.begun.wait(5)
    yield queue, held.go
    held.go.set()
    queue.close(5)


def test_a_client_with_fifty_jobs_does_not_keep_another_waiting(long) -> None:
    (queue, go), order = long, list[str]()

    def noted(name: str, steps: int = 1) -> Job:
        return Job(lambda job: order.append(name) or [Path(name)], steps)

    ann = [queue.submit(noted(f"ann {i}"), "ann") for i in range(50)]
    bob = [queue.submit(noted(f"bob {i}"), "bob") for i in range(2)]
    big = [queue.submit(noted("cat", 10), "cat"), queue.submit(noted("cat again", 10), "cat")]
    assert [queue.ahead(job) for job in (bob[0], big[0], ann[0])] == [1, 2, 3]
    go.set()
    assert all(job.wait(5) for job in (*ann, *bob, *big)), "nothing is lost"
    assert order[:5] == ["bob 0", "cat", "ann 0", "bob 1", "ann 1"]
    assert order.index("cat again") == order.index("ann 9") + 1, "turns are counted in steps"
    assert [name for name in order if "ann" in name] == [f"ann {i}" for i in range(50)]


def test_a_full_queue_takes_the_first_job_of_another_client(queue) -> None:
    held = Held()
    queue.submit(Job(held, 1), "ann")
    assert held.begun.wait(5)
    jobs = [queue.submit(quick("x"), "ann") for _ in range(3)]
    jobs += [queue.submit(quick("x"), client) for client in ("bob", "cat", "dan")]
    for client in ("ann", "bob", "eve"):  # twice as many wait: the end
        with pytest.raises(QueueFullError):
            queue.submit(quick("x"), client)
    held.go.set()
    assert all(job.wait(5) for job in jobs)


def batched(name: str, groups: list[list[str]], *, key: str = "k", fails: bool = False) -> Job:
    """A job that is drawn with up to two others of its key."""

    def draw(jobs: Sequence[Job]) -> None:
        groups.append([NAMES[job] for job in jobs])
        if fails:
            raise RuntimeError("together it does not fit")
        for job in jobs:
            job.pictures = [Path(NAMES[job])]

    def alone(job: Job) -> list[Path]:
        groups.append([name])
        if name == "broken":
            raise ValueError("broken")
        return [Path(name)]

    job = Job(alone, 1, Batch(key, 1, 3, REQUEST, draw))
    NAMES[job] = name
    return job


NAMES: dict[Job, str] = {}
REQUEST = GenerationRequest("x", 8, 8, 1, None, 0)


def test_jobs_that_are_alike_are_drawn_together_as_many_as_fit(long) -> None:
    (queue, go), groups = long, list[list[str]]()
    names = ["a", "other", "b", "c", "d"]
    jobs = [queue.submit(batched(n, groups, key="o" if n == "other" else "k"), "bob") for n in names]
    go.set()
    assert all(job.wait(5) for job in jobs)
    assert groups == [["a", "b", "c"], ["other"], ["d"]]
    assert [job.pictures[0].name for job in jobs] == names


def test_a_cancelled_or_broken_job_does_not_take_those_drawn_with_it_along(long) -> None:
    (queue, go), groups = long, list[list[str]]()
    jobs = [queue.submit(batched(name, groups, fails=True), "bob") for name in ("a", "broken", "c")]
    go.set()
    assert all(job.wait(5) for job in jobs)
    assert groups == [["a", "broken", "c"], ["a"], ["broken"], ["c"]]
    assert [job.view().state for job in jobs] == ["done", "failed", "done"]

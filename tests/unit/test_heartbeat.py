"""Ranks that watch one another: threads stand for ranks here."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sat.cli.main_guard import Stopped
from sat.errors import LostRankError, ReportedError, UserError
from sat.parallel.heartbeat import Heartbeat
from sat.parallel.launch import Runtime, ranks_together
from sat.util.host import machine
from tests.unit.test_lock import dead_pid


class Ranks:
    """Watches over one store; ``ended`` are those that would have been ended hard."""

    def __init__(self) -> None:
        self.store, self.watches = dist.HashStore(), []
        self.ended: dict[int, LostRankError] = {}

    def start(
        self,
        rank: int,
        world: int,
        silence: float = 0.6,
        stall: float = 20.0,
        store: dist.Store | None = None,
    ) -> Heartbeat:
        def end(error: LostRankError) -> None:
            self.ended[rank] = error

        store = dist.PrefixStore("watch", store or self.store)
        watch = Heartbeat(rank, world, silence, stall, store, end)
        self.watches.append(watch)
        return watch


@pytest.fixture(autouse=True)
def ranks(monkeypatch):
    monkeypatch.setattr("sat.parallel.heartbeat.GRACE", 0.1)
    ranks = Ranks()
    yield ranks
    for watch in ranks.watches:
        watch.stop()


def _error(watch: Heartbeat, seconds: float = 5.0) -> str:
    """What a watch finds wrong within ``seconds``, else empty."""
    until = time.monotonic() + seconds
    while watch.error is None and time.monotonic() < until:
        time.sleep(0.02)
    return str(watch.error or "")


def test_all_ranks_leave_together(ranks) -> None:
    watches, ends = [ranks.start(rank, 3) for rank in range(3)], dict[int, float]()

    def finish(rank: int) -> None:
        watches[rank].finish()
        ends[rank] = time.monotonic()

    threads = [threading.Thread(target=finish, args=(rank,)) for rank in range(3)]
    for thread in threads[:2]:
        thread.start()
    time.sleep(0.3)
    assert not ends
    last = time.monotonic()
    threads[2].start()
    for thread in threads:
        thread.join(5)
    assert len(ends) == 3
    assert min(ends.values()) >= last


def test_a_rank_without_heartbeat_is_named_with_what_it_did_last(ranks) -> None:
    watch, other = ranks.start(0, 2, 0.5), ranks.start(1, 2, 0.5)
    other.mark("step 3: backward pass")
    time.sleep(0.5)
    other.stop()
    with_it = r"rank 1 of 2 gave no sign of life for 0.5 s (last: step 3: backward pass); it has died or is"
    # Here its process lives, being this one: as if it ran on another machine.
    import sat.parallel.heartbeat as heartbeat

    heartbeat_machine, heartbeat.machine = heartbeat.machine, lambda: "elsewhere"
    try:
        assert _error(watch).startswith(with_it)
    finally:
        heartbeat.machine = heartbeat_machine
    time.sleep(0.3)
    assert str(ranks.ended[0]).startswith(with_it), "the main thread did not leave by itself"
    with pytest.raises(LostRankError, match="no sign of life"):
        watch.mark("more")


def test_a_rank_that_stands_still_is_stuck_and_one_that_waits_for_it_is_not_blamed(ranks) -> None:
    watches = [ranks.start(rank, 3, stall=1.0) for rank in range(3)]
    for step in range(3):
        for watch in watches:
            watch.ready()
            watch.mark(f"step {step}: read a batch", place=step * 100)
    for watch in (watches[0], watches[2]):
        watch.mark("step 2: forward pass")
    errors = [_error(watch, 8) for watch in watches]
    stuck = "rank 1 of 3 made no progress for 1 s (parallel.stall; last: step 2: read a batch)"
    assert all(error.startswith(stuck) for error in errors), errors


def test_nobody_is_stuck_while_a_rank_does_what_may_take_any_time(ranks) -> None:
    first, second = (ranks.start(rank, 2, stall=0.6) for rank in range(2))
    for watch in (first, second):
        watch.ready()
        watch.mark("step 1")
    with first.long("writing a checkpoint"):
        assert _error(second, 1.2) == ""
    assert "made no progress for 0.6 s" in _error(second, 6)


def test_a_failure_reaches_all_with_its_exit_code(ranks) -> None:
    watches = [ranks.start(rank, 3) for rank in range(3)]
    watches[1].fail(OSError("disk full"))
    watches[0].fail(RuntimeError("another rank died"))  # because the second is gone
    for watch in (watches[0], watches[2]):
        assert _error(watch) == "rank 1 failed: disk full; this rank stops too"
        assert isinstance(watch.error, ReportedError)
        with pytest.raises(ReportedError, match="rank 1 failed: disk full"):
            watch.abort("connection closed by peer")


@pytest.mark.parametrize(("error", "code"), [(UserError("no"), 2), (KeyboardInterrupt(), 130)])
def test_a_mistake_and_an_interruption_keep_their_code(ranks, error, code) -> None:
    watches = [ranks.start(rank, 2) for rank in range(2)]
    watches[1].fail(error)
    assert _error(watches[0])
    assert watches[0].error.exit_code == code


def test_the_end_of_the_store_is_told_as_such(ranks) -> None:
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=2), wait_for_workers=False
    )
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=2))
    watch = ranks.start(1, 2, 20.0, store=client)
    time.sleep(0.2)
    del server
    assert "common store is gone, so rank 0 or torchrun has ended" in _error(watch)
    watch.fail(ValueError("nobody hears this"))


def test_a_broken_exchange_without_a_reason_is_told_to_the_others(ranks) -> None:
    first, second = (ranks.start(rank, 2) for rank in range(2))
    with pytest.raises(LostRankError, match="connection closed"):
        first.abort("connection closed", patience=0.1)
    assert "rank 0 failed: connection closed" in _error(second)


def test_who_is_stopped_because_another_rank_was_killed_says_so(ranks, monkeypatch) -> None:
    """torchrun sends SIGTERM to the others at once."""
    state = [1, 3, False, False, "step 3: forward pass", dead_pid(), machine()]
    ranks.store.set("watch/rank1", json.dumps(state))
    monkeypatch.setattr("sat.parallel.launch.current", lambda: watch)
    watch = ranks.start(0, 2)
    time.sleep(0.2)
    alone = Runtime(0, 1, 0, torch.device("cpu"))
    with pytest.raises((LostRankError, Stopped)) as caught, ranks_together(alone):
        raise Stopped("SIGTERM")  # which would end pytest, where it escaped
    assert "rank 1 of 2 has ended (last: step 3: forward pass)" in str(caught.value)


def test_who_is_stopped_with_all_others_was_stopped(ranks, monkeypatch) -> None:
    watches = [ranks.start(rank, 2) for rank in range(2)]
    monkeypatch.setattr("sat.parallel.launch.current", lambda: watches[0])
    with pytest.raises(Stopped), ranks_together(Runtime(0, 1, 0, torch.device("cpu"))):
        watches[1].fail(Stopped("SIGTERM"))
        raise Stopped("SIGTERM")


def test_a_rank_alone_has_nothing_to_watch() -> None:
    watch = Heartbeat(0, 1)
    watch.mark("x")
    watch.fail(ValueError("x"))
    watch.finish()

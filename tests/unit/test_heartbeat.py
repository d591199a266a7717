"""Ranks that work alone learn of one another: threads stand for ranks here."""

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from sat.errors import LostRankError, ReportedError
from sat.parallel.heartbeat import Heartbeat


def _end(heartbeat: Heartbeat, ends: dict[int, object], rank: int) -> threading.Thread:
    def finish() -> None:
        try:
            heartbeat.finish()
            ends[rank] = time.monotonic()
        except LostRankError as error:
            ends[rank] = str(error)

    thread = threading.Thread(target=finish)
    thread.start()
    return thread


def test_all_ranks_leave_together() -> None:
    store, ends = dist.HashStore(), {}
    watches = [Heartbeat(rank, 3, 5.0, store) for rank in range(3)]
    early = [_end(watches[rank], ends, rank) for rank in (0, 1)]
    time.sleep(0.2)
    assert not ends
    last = time.monotonic()
    for thread in (*early, _end(watches[2], ends, 2)):
        thread.join(5)
    assert all(isinstance(end, float) and end >= last for end in ends.values())
    assert len(ends) == 3


def test_a_rank_may_take_longer_than_the_timeout_as_long_as_it_moves() -> None:
    store, ends = dist.HashStore(), {}
    waiting = _end(Heartbeat(0, 2, 2.0, store), ends, 0)
    slow = Heartbeat(1, 2, 2.0, store)
    for _ in range(4):
        time.sleep(1.0)
        slow.beat()
    assert not ends
    slow.finish()
    waiting.join(5)
    assert isinstance(ends[0], float)


def test_a_rank_that_stands_still_is_named() -> None:
    with pytest.raises(
        LostRankError, match=r"rank 1, 2 of 3 gave no sign of life for 0.3 s \(parallel.timeout\)"
    ):
        Heartbeat(0, 3, 0.3, dist.HashStore()).finish()


def test_bad_news_reaches_a_working_and_a_waiting_rank() -> None:
    store = dist.HashStore()
    Heartbeat(1, 3, 60.0, store).fail("disk full")
    with pytest.raises(LostRankError, match="rank 1 failed: disk full; this rank stops too"):
        Heartbeat(0, 3, 60.0, store).beat()
    with pytest.raises(LostRankError, match="rank 1 failed: disk full; this rank stops too"):
        Heartbeat(2, 3, 60.0, store).finish()


def test_the_end_of_the_store_is_told_as_such() -> None:
    server = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=2), wait_for_workers=False
    )
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=2))
    heartbeat = Heartbeat(1, 2, 60.0, client)
    del server
    with pytest.raises(LostRankError, match="common store is gone, so rank 0 or torchrun has ended"):
        heartbeat.finish()
    heartbeat.fail("nobody hears this")


def test_a_rank_alone_has_nothing_to_watch() -> None:
    heartbeat = Heartbeat(0, 1, 0.1)
    heartbeat.beat()
    heartbeat.fail("x")
    heartbeat.finish()


def test_the_first_cause_is_the_one_that_is_told() -> None:
    store = dist.HashStore()
    first, second, third = (Heartbeat(rank, 3, 5.0, store) for rank in range(3))
    second.fail("disk full")
    first.fail("another rank died")  # because the second is gone
    with pytest.raises(ReportedError, match="rank 1 failed: disk full; this rank stops too"):
        third.abort("connection closed by peer")


def test_a_broken_exchange_without_a_reason_is_told_to_the_others() -> None:
    store = dist.HashStore()
    with pytest.raises(LostRankError, match="connection closed"):
        Heartbeat(0, 3, 5.0, store).abort("connection closed", patience=0.1)
    with pytest.raises(ReportedError, match="rank 0 failed: connection closed"):
        Heartbeat(2, 3, 5.0, store).beat()

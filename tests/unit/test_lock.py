"""One writer a folder: who is refused, who is dead, who may write beside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sat.util import lock as locks
from sat.util.lock import BusyError, Lock, read, share_lock


def _other(path: Path, **changes: object) -> Lock:
    """The lock file of another process, which is not running on this machine unless ``changes`` say so."""
    lock = Lock(path, "RUN")
    lock.owner = replace(lock.owner, **changes)
    path.write_text(json.dumps(asdict(lock.owner)))
    return lock


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(locks, "STALE", 1.0)
    monkeypatch.setattr(locks, "REFRESH", 0.1)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_the_second_writer_gets_a_line_that_names_the_first(tmp_path) -> None:
    path = tmp_path / "lock"
    with Lock(path, "RUN"):
        with pytest.raises(
            BusyError, match=rf"RUN is being written by .*process {os.getpid()} on "
        ) as refused:
            Lock(path, "RUN").__enter__()
        assert refused.value.exit_code == 2
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())
    with Lock(path, "RUN"):
        pass


@pytest.mark.parametrize("owner", ["dead", "reused", "requeued", "elsewhere", "unreadable"])
def test_a_lock_whose_owner_is_gone_is_taken_over_with_a_line(tmp_path, caplog, monkeypatch, owner) -> None:
    path = tmp_path / "lock"
    if owner == "dead":
        _other(path, pid=dead_pid())
    elif owner == "reused":
        _other(path, born="1")
    elif owner == "requeued":
        _other(path, machine="00000000", job="7")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    elif owner == "elsewhere":
        _other(path, machine="00000000")  # nobody touches it
    else:
        path.write_text("{")
        os.utime(path, (1, 1))
    with Lock(path, "RUN") as lock:
        assert read(path) == lock.owner
        assert "RUN: taken over from a run that is gone (process" in caplog.text
    assert not list(tmp_path.iterdir())


def test_an_owner_elsewhere_that_touches_its_file_is_alive(tmp_path) -> None:
    path = tmp_path / "lock"
    _other(path, machine="00000000")
    over = threading.Event()

    def touch() -> None:
        while not over.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(BusyError):
            Lock(path, "RUN").__enter__()
    finally:
        over.set()
        thread.join()


def test_of_many_that_find_a_dead_owner_one_wins(tmp_path) -> None:
    path = tmp_path / "lock"
    _other(path, pid=dead_pid())
    start, ends = threading.Barrier(8), []

    def enter() -> None:
        lock = Lock(path, "RUN")
        start.wait()
        try:
            lock.__enter__()
            ends.append(lock)
        except BusyError:
            ends.append(None)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [lock for lock in ends if lock is not None]
    assert read(path) == winner.owner
    winner.release()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_lost_its_lock_stops_and_leaves_the_new_one_alone(tmp_path) -> None:
    path = tmp_path / "lock"
    with Lock(path, "RUN") as lock:
        lock.check()
        _other(path, token="theirs")
        until = time.monotonic() + 5
        while not lock.lost and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(BusyError, match="taken over by another run"):
            lock.check()
    assert read(path).token == "theirs"


def test_shares_of_one_config_draw_side_by_side_and_nothing_else_does(tmp_path) -> None:
    def enter(part: int, parts: int, purpose: str = "a"):
        return share_lock(tmp_path, part, parts, purpose, "OUT")

    with enter(0, 2), enter(1, 2), pytest.raises(BusyError, match="draws this share here"), enter(0, 2):
        pass
    with enter(0, 2), enter(3, 4), pytest.raises(BusyError, match="this share"), enter(2, 4):
        pass
    with enter(0, 2), pytest.raises(BusyError, match="draws pictures here"), enter(0, 1):
        pass
    with enter(0, 2), pytest.raises(BusyError, match="share 0/2 of another config"), enter(1, 2, "b"):
        pass
    assert not list(tmp_path.iterdir())

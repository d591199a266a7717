"""Asking a run to stop: the first Ctrl-C, SIGTERM or SIGUSR1 lets the step end and the state be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ECHO = 2.0
"""Seconds in which a repeated signal is the same wish: torchrun sends on what a terminal has sent already."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGINT, SIGTERM or SIGUSR1; a later second one acts as before. Old handlers return.

    SIGUSR1 is what SLURM is mostly told to send before a job's time is over. Outside the main thread no
    signal arrives, so the event stays clear.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    first = 0.0
    old: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not event.is_set():
            event.set()
            first = time.monotonic()
            os.write(2, b"\nstopping after this step (once more to stop at once)\n")
        elif time.monotonic() - first > _ECHO:
            signal.signal(number, old[signal.Signals(number)])
            os.kill(os.getpid(), number)

    for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        old[wanted] = signal.signal(wanted, handle)
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

"""Errors of a command: one clear line, and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from sat.errors import ReportedError, UserError
from sat.util.log import describe

FAILED, INTERRUPTED = 1, 130


class UsageError(UserError, ValueError):
    """The command line asks for something impossible."""


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived: leave like on Ctrl-C, cleaning up."""


def guard(work: Callable[[], int], *, debug: bool = False, on_stop: str = "") -> int:
    """Run ``work`` and return its exit code; an error becomes one line on standard error and code 1 or 2.

    A :class:`UserError` brings its code, 2 for a mistake in the command line or the config; 130 stands for
    Ctrl-C and SIGTERM, 1 for everything else. A mistake is the same on every rank, so only rank 0 tells it; a
    rank's failure is told by that rank and rank 0. ``debug`` prints the traceback; ``on_stop`` says how to
    go on after an interruption.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped

    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us keeps the signal
        signal.signal(signal.SIGTERM, stop)
    try:
        return work()
    except KeyboardInterrupt as end:
        cause = "SIGTERM" if isinstance(end, Stopped) else "Ctrl-C"
        _tell(f"stopped by {cause}" + (f"; {on_stop}" if on_stop else ""))
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # quiet the last flush
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        mistake = isinstance(error, UserError) and error.exit_code != FAILED
        if _rank() == 0 or not (mistake or isinstance(error, ReportedError)):
            _tell(f"error: {describe(error)}" + ("" if debug or mistake else " (--debug shows where)"))
        return error.exit_code if isinstance(error, UserError) else FAILED


def _tell(line: str) -> None:
    rank = _rank()
    print(f"[rank {rank}] {line}" if rank else line, file=sys.stderr, flush=True)


def _rank() -> int:
    """This process's rank as its launcher says, 0 without one."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0

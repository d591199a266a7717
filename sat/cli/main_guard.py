"""What every command does around its work: one clear line for an error, and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from sat.util.log import describe

FAILED, MISUSED, INTERRUPTED = 1, 2, 130

# Raised far below by what the user typed or wrote; told by name so that a command imports only what it needs.
_USER_ERRORS = frozenset(
    {
        "ConfigError",
        "RuleError",
        "UsageError",
        "PromptError",
        "SizeError",
        "LatentsError",
        "AdapterError",
        "RequestError",
    }
    | {"LayoutError"}
)


class UsageError(ValueError):
    """The command line asks for something impossible."""


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived: leave like on Ctrl-C, cleaning up."""


def guard(work: Callable[[], int], *, debug: bool = False, on_stop: str = "") -> int:
    """Run ``work`` and return its exit code; an error becomes one line on standard error and code 1 or 2.

    2 stands for a mistake in the command line or the config, 1 for everything else, 130 for Ctrl-C and
    SIGTERM. A mistake is the same on every rank, so only rank 0 tells it; of a rank's failure only that rank
    and rank 0 tell. ``debug`` prints the traceback too; ``on_stop`` says how to go on after an interruption.
    """
    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us keeps the signal
        signal.signal(signal.SIGTERM, _stop)
    try:
        return work()
    except KeyboardInterrupt as stop:
        cause = "SIGTERM" if isinstance(stop, Stopped) else "Ctrl-C"
        _tell(f"stopped by {cause}" + (f"; {on_stop}" if on_stop else ""))
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nobody reads on; quiet Python's last flush
        return FAILED
    except Exception as error:
        if debug:
            traceback.print_exc()
        kinds = {kind.__name__ for kind in type(error).__mro__}
        mistake = bool(_USER_ERRORS & kinds)
        if not (mistake or "ToldError" in kinds) or _rank() == 0:
            _tell(f"error: {describe(error)}" + ("" if debug or mistake else " (--debug shows where)"))
        return MISUSED if mistake else FAILED


def _tell(line: str) -> None:
    rank = _rank()
    print(f"[rank {rank}] {line}" if rank else line, file=sys.stderr, flush=True)


def _rank() -> int:
    """This process's rank as its launcher says, 0 without one."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Stopped

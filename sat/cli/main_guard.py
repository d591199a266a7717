"""Errors of a command: one clear line, and an exit code."""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from sat.errors import LostRankError, ReportedError, UserError
from sat.util.ending import FAILED, INTERRUPTED, STOPPED_EARLY, begin, rank, tell
from sat.util.log import describe

PATH_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EROFS}
"""Errors whose line says all there is to know: a path and why it cannot be used."""
_DEAF = 30.0
"""Seconds after a command's end in which a late signal no longer changes its exit code."""


class UsageError(UserError, ValueError):
    """The command line asks for something impossible."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 arrived: leave like on Ctrl-C, cleaning up."""


def guard(work: Callable[[], int], *, debug: bool = False, on_stop: str = "") -> int:  # noqa: C901 - in order
    """Run ``work`` and return its exit code; an error becomes one line on standard error and code 1 or 2.

    A :class:`UserError` brings its code, 2 for a mistake in the command line or the config; 130 stands for
    Ctrl-C and SIGTERM, 75 for work that was saved to be continued, 1 for everything else. A mistake is the
    same on every rank, so only rank 0 tells it; a rank's failure is told by that rank and rank 0. ``debug``
    prints the traceback; ``on_stop`` says how to go on after an interruption, unless the work says it in
    ``ending.again``. Code and reason go to ``ended.json`` (:mod:`sat.util.ending`).
    """
    ending = begin()
    ending.again = lambda: on_stop

    def stop(number: int, frame: FrameType | None) -> None:
        if not ending.sealed:
            raise Stopped(signal.Signals(number).name)
        if time.monotonic() - ending.sealed > _DEAF:  # a program that runs on after the command
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if ending.sealed or not isinstance(what.exc_value, KeyboardInterrupt):
            shown(what)
            return
        number = signal.Signals[str(what.exc_value) or "SIGINT"]  # came in a finalizer: once more, outside
        timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    shown, sys.unraisablehook = sys.unraisablehook, dropped
    with contextlib.suppress(ValueError):  # not the main thread: whoever runs us keeps the signal
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:  # it may be ignored on purpose
            signal.signal(signal.SIGUSR1, stop)
        atexit.register(_ignore_signals)
    code, reason, own = FAILED, "", True
    try:
        code = work()
        reason = ending.reason or (
            "done" if not code else "stopped early" if code == STOPPED_EARLY else "failed"
        )
    except KeyboardInterrupt as end:
        ending.seal()
        cause = str(end) if isinstance(end, Stopped) else "Ctrl-C"
        again = ending.again()
        code, reason = INTERRUPTED, f"stopped by {cause}" + (f"; {again}" if again else "")
        tell(reason)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # quiet the last flush
        reason = "nobody reads the output"
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = describe(error)
        code, own = getattr(error, "exit_code", FAILED), not isinstance(error, ReportedError)
        mistake = isinstance(error, UserError) and code != FAILED
        if rank() == 0 or (own and not mistake):
            known = isinstance(error, (UserError, LostRankError))
            known = known or getattr(error, "errno", None) in PATH_ERRORS
            shows = "" if debug or known else " (--debug shows where)"
            tell(f"error: {reason}{shows}")
    finally:
        ending.seal()
        sys.unraisablehook = shown
    ending.write(code, reason, own=own)
    if code in (STOPPED_EARLY, INTERRUPTED) and ending.folder and os.environ.get("SAT_QUIET_STOP"):
        return 0  # the SLURM scripts read ended.json; torchrun would print a traceback for a normal stop
    return code


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Import inside without the cyclic collector, which would look at the same modules again and again.

    What is imported stays to the end, so that later collections leave it out.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was:
            gc.enable()


def leave(code: int) -> NoReturn:
    """End the process as ``sys.exit`` does, without taking it apart: after torch that takes 0.2 to 0.3 s.

    What was registered for the exit is run, and output flushed. With other threads, a profiler or a debugger
    the interpreter ends as usual.
    """
    run: Callable[[], None] | None = getattr(atexit, "_run_exitfuncs", None)
    watched = sys.getprofile() or sys.gettrace() or sys.flags.interactive or threading.active_count() > 1
    if run is None or watched:
        sys.exit(code)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(code)  # which tells it
    run()
    os._exit(code)


def _ignore_signals() -> None:
    """Keep the exit code while the interpreter shuts down, which takes seconds after torch.

    Python puts its own handlers back to the default on the way, and a late signal would end the process.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        with contextlib.suppress(ValueError):
            signal.signal(number, signal.SIG_IGN)


_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def refuse_tasks(program: str, argv: Sequence[str] | None) -> None:
    """Raise :class:`UsageError` in one of several tasks of srun or mpirun that does not know its rank.

    Each would be a run of its own, all of them in one folder. ``program`` is a file or ``-m module``.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    for name in _TASKS:
        text = os.environ.get(name, "")
        if not text.isdigit() or int(text) < 2:
            continue
        tasks, nodes = int(text), os.environ.get("SLURM_STEP_NUM_NODES", "1")
        words = shlex.join(sys.argv[1:] if argv is None else argv)
        if sys.argv[0].startswith("cogview3 "):
            program = f"-m {sys.argv[0]}"
        each = -(-tasks // int(nodes)) if nodes.isdigit() and int(nodes) > 1 else tasks
        command = f"torchrun --standalone --nproc_per_node {each} {program} {words}".strip()
        if each < tasks:
            command = (
                f"sbatch --nodes {nodes} train_scripts/sft.sbatch, or a script of yours with its on_nodes "
                f"(docs/slurm.md)"
            )
        elif name == _TASKS[0]:
            command = f"srun --ntasks=1 {command}"
        launcher = "srun" if name == _TASKS[0] else "mpirun"
        raise UsageError(
            f"{launcher} started {tasks} tasks ({name}) and none knows its rank, so each would be a run of "
            f"its own in one folder. Start one task a node, in which torchrun starts the ranks: {command}"
        )

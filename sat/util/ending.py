"""End of a process: its exit code, and the reason in ``ended.json`` and in torch's error file.

torchrun turns every exit code into 1, so both files have the code that the rank ended with. Standard library
only: commands use it before torch is imported, and a watching thread uses it where nothing else works.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sat.util.host import write_text

if TYPE_CHECKING:
    from sat.util.lock import Lock

FAILED, MISTAKE, STOPPED_EARLY, INTERRUPTED = 1, 2, 75, 130
"""Exit codes beside 0: a failure, the user's mistake, stopped to be continued, Ctrl-C or SIGTERM."""
ENDED = "ended.json"


def ended_name(part: int, parts: int) -> str:
    """Name of the file for share ``part`` of ``parts``, which draw into one folder side by side."""
    return ENDED if parts == 1 else f"ended-{part}-of-{parts}.json"


class Ending:
    """Place and progress of this process's run; what is known of them when the process ends.

    ``folder`` gets ``name`` (``ended.json``) once a run owns it by its ``lock``, which rank 0 has. ``step``
    is that of a training. ``again`` says how to go on after an interruption, and is asked only then.
    ``reason`` is that of an end without an error. Once ``sealed`` (a time), signals no longer change the end.
    ``releases`` run before a process is ended hard.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.name = ENDED
        self.step: int | None = None
        self.again: Callable[[], str] = str
        self.lock: Lock | None = None
        self.releases: list[Callable[[], None]] = []
        self.reason = ""
        self.sealed = 0.0
        self._written = False

    def own(self, folder: Path, part: int = 0, parts: int = 1) -> None:
        """Let a share's file in ``folder`` be the place of the reason; rank 0 removes an earlier run's."""
        self.folder, self.name = folder, ended_name(part, parts)
        if rank() == 0:
            with contextlib.suppress(OSError):
                (folder / self.name).unlink()

    def seal(self) -> None:
        """Let no later signal change how this process ends: its work is saved, or it is leaving."""
        self.sealed = time.monotonic()

    def write(self, code: int, reason: str, *, own: bool = True) -> None:
        """Write both files, as far as they can be; ``own`` is false for a failure that another rank had.

        ``ended.json`` is written by rank 0 and by a rank with a failure of its own.
        """
        self._written = True
        line = reason.strip().splitlines()[0] if reason.strip() else ""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        facts = {"code": code, "reason": line, "step": self.step, "time": now, "rank": rank()}
        facts["job"] = os.environ.get("SLURM_JOB_ID")
        failed = own and code == FAILED
        if self.folder is not None and (failed or (rank() == 0 and not self._told())):
            with contextlib.suppress(OSError):
                write_text(self.folder / self.name, json.dumps(facts, ensure_ascii=False) + "\n")
        if code and (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            told = f"{line} (exit code {code})"  # torchrun's last lines have what stands for the traceback
            extra = {"py_callstack": told, "timestamp": str(int(time.time())), "code": code}
            message = {"message": told, "errorCode": code, "extraInfo": extra}
            with contextlib.suppress(OSError):
                write_text(Path(path), json.dumps({"message": message}))

    def _told(self) -> bool:
        """True if another rank has written its failure during this run."""
        assert self.folder is not None, "only asked with one"
        try:
            return bool(json.loads((self.folder / self.name).read_text())["code"] == FAILED)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def hard(self, reason: str, code: int = FAILED, *, own: bool = True) -> NoReturn:
        """End the process now, from any thread, after saying ``reason`` unless it has been said."""
        if not self._written:
            if own or rank() == 0:
                tell(f"error: {reason}")
            self.write(code, reason, own=own)
        for release in self.releases:
            with contextlib.suppress(Exception):
                release()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


ending = Ending()
"""Of the command that this process runs."""


def begin() -> Ending:
    """Forget an earlier command's place and progress in this process."""
    ending.__init__()  # type: ignore[misc]
    return ending


def rank() -> int:
    """This process's rank as torchrun, or else srun or mpirun, says; 0 without them."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    text = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(text) if text.isdigit() else 0


def tell(line: str) -> None:
    """Print ``line`` on standard error, behind the rank where it is not 0."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads it
        sys.stderr.write(f"[rank {rank()}] {line}\n" if rank() else f"{line}\n")
        sys.stderr.flush()

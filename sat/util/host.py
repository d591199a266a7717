"""Files, memory sizes and CPU threads of the machine. Standard library only, as it runs before torch."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

TEMPORARY = ".partial"
"""Ending of a file that is still being written."""
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
THREAD_SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "MKL_CBWR": "AUTO,STRICT"}
"""Environment of :func:`prepare_threads`."""
SPIN = "5000"
"""Rounds, some 60 microseconds, that a thread of an idle machine waits for the next operator awake."""

HOME = Path(__file__).resolve().parents[2]
"""The folder that holds the ``sat`` package, and in a checkout ``configs/`` and ``checkpoints/``."""


def install(extra: str) -> str:
    """The command that installs an extra of this package: in its checkout, or beside an installed one."""
    checkout = (HOME / "pyproject.toml").is_file()
    return f"pip install -e '.[{extra}]'" if checkout else f"pip install 'cogview3[{extra}]'"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path``, which appears whole or not at all."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a hidden file beside ``path``, then move it there in one step.

    A run that is killed at any moment leaves no half file under ``path``, and a reader never sees one. The
    disk is not waited for: after a power cut, only reading a file back tells.
    """
    draft = path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{uuid4().hex[:12]}{TEMPORARY}")
    try:
        with draft.open("wb") as file:
            write(file)
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def check_regular(path: Path, most: int | None = None) -> None:
    """Raise OSError, saying what ``path`` is, unless it is a regular file of ``most`` bytes at most.

    A FIFO or a device would be read for ever.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        kinds = {"p": "a FIFO", "c": "a device", "b": "a device", "s": "a socket"}
        kind = kinds.get(stat.filemode(found.st_mode)[0], "something else")
        raise OSError(errno.EINVAL, f"is {kind}, expected a regular file")
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"has {found.st_size} bytes, more than {most}")


def read_bounded(path: Path, most: int) -> bytes:
    """The content of a regular file of ``most`` bytes at most; else :func:`check_regular`'s error."""
    check_regular(path, most)
    with path.open("rb") as file:
        return file.read(min(most, path.stat().st_size or most))  # which is allocated at once


def abandoned(draft: Path) -> bool:
    """True if a draft of :func:`write_atomic` has no owner any more, or is this process's own.

    Another machine's is abandoned after ten minutes by the file system's clock.
    """
    named = re.search(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{12}\.partial$", draft.name)
    if named is not None and named[1] == machine():
        return int(named[2]) == os.getpid() or not alive(int(named[2]))
    try:
        return file_clock(draft.parent) - draft.stat().st_mtime > 600
    except OSError:  # gone
        return False


@cache
def machine() -> str:
    """8 hexadecimal digits of the machine since its start, and of the container: where pids mean the same."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with contextlib.suppress(OSError):
        facts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b(" ".join(facts).encode(), digest_size=4).hexdigest()


def alive(pid: int) -> bool:
    """True if a process of this machine has the number ``pid`` and has not ended; a suspended one has not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # someone else's
        return True
    return process_fact(pid, 0) not in ("Z", "X")


def process_fact(pid: int, field: int) -> str:
    """Value of a process in /proc: 0 is its state (R, S, D, T, Z), 19 its begin in ticks; else empty."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    return ""


def file_clock(folder: Path) -> float:
    """Time now by the clock of the file system of ``folder``, which dates its files; seconds."""
    draft = folder / f".clock.{uuid4().hex[:12]}{TEMPORARY}"
    try:
        draft.touch()
        return draft.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def available_memory() -> int:
    """Bytes of host memory that programs can still get without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else 0


def parse_size(text: str) -> int:
    """Bytes of ``24GB`` (1e9 each) or ``24GiB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    if found is None:
        raise ValueError(f"expected a size such as 24GB or 80GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def prepare_threads() -> None:
    """Set up the threads of a CPU run; the user's own settings stay. Without effect once torch is imported.

    Waiting OpenMP threads sleep instead of spinning: a spinning thread holds the core that the one it waits
    for may need, and where other programs use the cores too a small network ran several times slower. Where
    nothing else runs they spin for :data:`SPIN` rounds first, as waking up takes longer than a small product
    (GNU's OpenMP, which torch's wheels have): the small model's picture took half the time. MKL is
    asked for matrix products that do not depend on the number of threads (measured: no slower), so that one
    process and several ranks with fewer threads each draw the same float32 pictures to the last bit.
    """
    if "torch" in sys.modules:
        return
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and "OMP_WAIT_POLICY" not in os.environ
    if alone and idle():
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
    for name, value in THREAD_SETTINGS.items():
        os.environ.setdefault(name, value)


def idle(looks: int = 5) -> bool:
    """True if nothing but this process runs, at one of some ``looks`` at least; False if that is not told."""
    with contextlib.suppress(OSError, IndexError):
        for _ in range(looks):
            if Path("/proc/loadavg").read_text().split()[3].partition("/")[0] == "1":
                return True
            time.sleep(0.001)
    return False


def trim_heap() -> None:
    """Give what is free in the C library's heap back to the system, where it can (glibc)."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)

"""Log lines, progress lines and errors in words."""

from __future__ import annotations

import logging
import re
import sys
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm
    from typing_extensions import Self

log = logging.getLogger(__name__)

# Their text is a sentence for the user; anything else is shown with its kind.
_PLAIN_ERRORS = (ValueError, OSError, RuntimeError, ArithmeticError)


_MOST_WORD, _MOST_LINE = 240, 1500


def one_line(text: str) -> str:
    """``text`` as one readable line: control characters escaped, long words and lines cut inside."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda m: ascii(m[0])[1:-1], text)
    text = re.sub(rf"\S{{{_MOST_WORD},}}", lambda m: f"{m[0][:120]}…{m[0][-60:]}", text)
    return text if len(text) <= _MOST_LINE else f"{text[: _MOST_LINE - 200]} … {text[-150:]}"


def describe(error: BaseException) -> str:
    """``error`` in one clear line (or, for a list of problems, one line each), with long echoes cut."""
    return "\n".join(map(one_line, _described(error).split("\n")))


def _described(error: BaseException) -> str:
    text = str(error).strip()
    kind = type(error).__name__
    if kind in ("OutOfMemoryError", "MemoryError"):
        first = text.splitlines()[0] if text else kind
        return (
            f"out of memory: {first} Try a smaller --height and --width, sampling.dtype=bf16, "
            f"memory.text_encoder=free or memory.decode_tile=64"
        )
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if not text:
        return kind
    return text if isinstance(error, _PLAIN_ERRORS) else f"{kind}: {text}"


_TITLE = 32  # characters of a prompt that a progress line shows


def title(text: str) -> str:
    """The beginning of ``text``, safe to print on one line."""
    line = "".join(c if c.isprintable() else " " for c in text[: _TITLE + 1])
    return line if len(text) <= _TITLE else line[: _TITLE - 1] + "…"


EVERY = 60.0
"""Seconds between the lines that stand for a bar in a log."""


def progress(
    total: int, *, unit: str = "step", rank: int = 0, stream: TextIO | None = None, lines: bool = True
) -> tqdm | Lines:
    """A bar over ``total`` steps on rank 0 if ``stream`` (standard error) is a terminal.

    Elsewhere log lines stand for it, a minute apart; ``lines`` False and other ranks are silent.
    """
    out = stream if stream is not None else sys.stderr
    shown = rank == 0 and total > 0 and log.isEnabledFor(logging.INFO)
    if shown and lines and not out.isatty():
        return Lines(total, unit)
    from tqdm import tqdm

    return tqdm(
        total=total, unit=unit, file=out, dynamic_ncols=True, leave=True, mininterval=0.1,
        disable=not (shown and out.isatty()),
    )  # fmt: skip


class Lines:
    """Log lines in place of a bar, with the time left: ``[3/8] a dog: step 120 of 400, 0:02:05 left``."""

    disable = False

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.done, self.about = total, unit, 0, ""
        self.began = self.told = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description_str(self, text: str) -> None:
        """Begin the next lines with ``text``."""
        self.about = f"{text}: "

    def set_postfix_str(self, text: str) -> None:
        """Nothing: a log has lines of its own for that."""

    def update(self, count: int = 1) -> None:
        """Count ``count`` more steps."""
        self.done += count
        now = time.monotonic()
        if now - self.told < EVERY or self.done >= self.total:
            return
        self.told, left = now, (now - self.began) / self.done * (self.total - self.done)
        log.info("%s%s %d of %d, %s left", self.about, self.unit, self.done, self.total, clock(left))


def clock(seconds: float) -> str:
    """``h:mm:ss``."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


# -- logging of the commands: short lines on standard error, rank 0 first, kept clear of a progress bar


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the present ``sys.stderr``, lifting a progress bar out of the way if one is drawn."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        known = sys.modules.get("tqdm")  # a bar can only stand there if it was imported
        with nullcontext() if known is None else known.tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)


class _Formatter(logging.Formatter):
    """``message``; ``warning: message``; on ranks other than 0 ``[rank 1] warning: message``."""

    def __init__(self, rank: int, *, debug: bool) -> None:
        super().__init__()
        self._rank = rank
        self._debug = debug

    def format(self, record: logging.LogRecord) -> str:
        """The line(s) of one record."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if self._debug:
            text = f"{record.name}: {text}"
        if self._rank:
            text = f"[rank {self._rank}] {text}"
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


def setup(rank: int = 0, *, debug: bool = False, verbosity: int = 0) -> None:
    """Send this package's log to standard error: everything from rank 0, warnings and errors from the others.

    ``verbosity`` 1 adds details, -1 leaves warnings and errors; ``debug`` adds details and the module names.
    Other libraries speak from warnings on. Calling it again replaces the earlier setting.
    """
    handler = _Handler()
    handler.setFormatter(_Formatter(rank, debug=debug))
    handler.set_name("sat")
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "sat"]:
        root.removeHandler(old)
    root.addHandler(handler)
    level = logging.INFO if rank == 0 and verbosity >= 0 else logging.WARNING
    level = logging.DEBUG if debug or (rank == 0 and verbosity > 0) else level
    logging.getLogger("sat").setLevel(level)

"""Logging of the commands: short lines on standard error, rank 0 first, kept clear of a progress bar."""

from __future__ import annotations

import logging
import sys


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to the present ``sys.stderr``, lifting a progress bar out of the way if one is drawn."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        tqdm = sys.modules.get("tqdm")  # a bar can only stand there if tqdm was imported
        if tqdm is None:
            super().emit(record)
            return
        with tqdm.tqdm.external_write_mode(file=sys.stderr):
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


def setup(rank: int = 0, *, debug: bool = False) -> None:
    """Send this package's log to standard error: everything from rank 0, warnings and errors from the others.

    ``debug`` adds the debug level and the module names. Other libraries speak from warnings on.
    Calling it again replaces the earlier setting.
    """
    handler = _Handler()
    handler.setFormatter(_Formatter(rank, debug=debug))
    handler.set_name("sat")
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "sat"]:
        root.removeHandler(old)
    root.addHandler(handler)
    level = logging.DEBUG if debug else logging.INFO if rank == 0 else logging.WARNING
    logging.getLogger("sat").setLevel(level)

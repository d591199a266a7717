"""A progress line over many steps, shown on a terminal and silent elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, TextIO


class Progress(Protocol):
    """What a long task tells about how far it is."""

    def note(self, text: str) -> None:
        """Show what is being worked on."""

    def advance(self, steps: int = 1) -> None:
        """Count ``steps`` more as done."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Silent:
    """Progress nobody sees."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def advance(self, steps: int = 1) -> None:
        """Count nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class Bar:
    """A tqdm bar with the time left; what :meth:`note` says stands before it."""

    def __init__(self, total: int, unit: str, stream: TextIO) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, unit=unit, file=stream, dynamic_ncols=True, leave=True, mininterval=0.1)

    def note(self, text: str) -> None:
        """Show ``text`` before the bar."""
        self._bar.set_description_str(text, refresh=True)

    def advance(self, steps: int = 1) -> None:
        """Move the bar on by ``steps``."""
        self._bar.update(steps)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def progress(total: int, *, unit: str = "step", rank: int = 0, stream: TextIO | None = None) -> Progress:
    """A bar over ``total`` steps on rank 0 if ``stream`` (standard error) is a terminal, else silence."""
    out = stream if stream is not None else sys.stderr
    if rank != 0 or total <= 0 or not out.isatty():
        return Silent()
    return Bar(total, unit, out)

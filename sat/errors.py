"""Errors that commands know: mistakes of the user's, with their exit code, and failures of another rank."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can mend: a value, a path, a file. Commands print it in one line.

    ``exit_code`` is that of the process: 2 for a mistake in what was asked for.
    """

    exit_code = 2


class LostRankError(RuntimeError):
    """Another rank died, stands still or failed; this one ends too, with ``exit_code``."""

    def __init__(self, line: str, exit_code: int = 1) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class ReportedError(LostRankError):
    """Another rank failed and has reported it itself."""

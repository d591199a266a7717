"""Errors that commands know: mistakes of the user's, with their exit code, and failures of another rank."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can mend: a value, a path, a file. Commands print it in one line.

    ``exit_code`` is that of the process: 2 for a mistake in what was asked for.
    """

    exit_code = 2


class LostRankError(RuntimeError):
    """Another rank died or fell silent; this one cannot go on."""


class ReportedError(LostRankError):
    """Another rank failed and has reported it itself."""

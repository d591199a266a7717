"""Errors of a user's making, with the exit code that a command ends with."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can mend: a value, a path, a file. Commands print it in one line.

    ``exit_code`` is that of the process: 2 for a mistake in what was asked for.
    """

    exit_code = 2

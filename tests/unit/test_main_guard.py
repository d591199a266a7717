"""What the commands make of errors: one line, an exit code."""

import signal
import time

import pytest

from sat.cli.main_guard import UsageError, guard
from sat.config.yaml_source import ConfigError, Problem
from sat.errors import ReportedError, UserError
from sat.util.log import describe


def _fail(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("give a prompt"), 2, "error: give a prompt\n"),
        (ConfigError([Problem("a.yaml:3", "steps", "wrong")]), 2, "error: a.yaml:3: steps: wrong\n"),
        (ValueError("height is 3"), 1, "error: height is 3 (--debug shows where)\n"),
        (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where)\n"),
        (AssertionError(), 1, "error: AssertionError (--debug shows where)\n"),
        (
            OSError(28, "No space left", "out/a.png"),
            1,
            "error: out/a.png: No space left (--debug shows where)\n",
        ),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; use --resume\n"),
    ],
)
def test_an_error_is_one_line_and_a_code(capsys, error: BaseException, code: int, line: str) -> None:
    assert guard(_fail(error), on_stop="use --resume") == code
    assert capsys.readouterr().err == line


def test_the_exit_code_of_the_work_is_kept() -> None:
    assert guard(lambda: 0) == 0
    assert guard(lambda: 3) == 3


def test_debug_shows_the_traceback(capsys) -> None:
    assert guard(_fail(ValueError("deep")), debug=True) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: deep\n")


def test_a_mistake_is_told_by_rank_0_and_a_failure_by_each(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert guard(_fail(UsageError("give a prompt"))) == 2
    assert capsys.readouterr().err == ""
    assert guard(_fail(ValueError("boom"))) == 1
    assert capsys.readouterr().err.startswith("[rank 1] error: boom")


def test_what_another_rank_has_told_is_repeated_by_rank_0_alone(capsys, monkeypatch) -> None:
    assert guard(_fail(ReportedError("rank 2 failed: disk full"))) == 1
    assert "rank 2 failed: disk full" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert guard(_fail(ReportedError("rank 2 failed: disk full"))) == 1
    assert capsys.readouterr().err == ""


def test_out_of_memory_says_what_to_try() -> None:
    assert "sampling.dtype=bf16" in describe(MemoryError())


def test_sigterm_stops_like_ctrl_c(capsys) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> int:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(5)
        return 0

    try:
        assert guard(work) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_an_error_of_the_users_brings_its_exit_code() -> None:
    class Unanswered(UserError):
        exit_code = 7

    assert guard(_fail(Unanswered("nobody answers"))) == 7

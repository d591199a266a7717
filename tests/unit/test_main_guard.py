"""What the commands make of errors: one line, an exit code."""

import json
import signal
import subprocess
import sys
import time

import pytest

from sat.checkpoint import CheckpointError
from sat.cli.main_guard import UsageError, guard, refuse_tasks
from sat.config.yaml_source import ConfigError, Problem
from sat.errors import ReportedError, UserError
from sat.util.ending import ending
from sat.util.log import describe
from tests.configs import ROOT


def _fail(error: BaseException):
    def work() -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("give a prompt"), 2, "error: give a prompt\n"),
        (ConfigError([Problem("a.yaml:3", "steps", "wrong")]), 2, "error: a.yaml:3: steps: wrong\n"),
        (CheckpointError("a.pt: damaged; copy it again"), 1, "error: a.pt: damaged; copy it again\n"),
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_comes_in_a_finalizer_is_not_lost(capsys, number: int) -> None:
    """The interpreter drops an exception that is raised there."""

    class Told:
        def __del__(self) -> None:
            signal.raise_signal(number)
            time.sleep(0.01)

    def work() -> int:
        told = Told()
        del told
        time.sleep(20)
        return 0

    before, hook = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    asked = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert guard(work) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, asked)
    assert capsys.readouterr().err == f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}\n"
    assert sys.unraisablehook is hook


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


@pytest.fixture
def signals():
    """The handlers of this process, put back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_the_end_stands_in_the_folder_and_in_torchs_error_file(tmp_path, monkeypatch, signals) -> None:
    error_file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(error_file))
    monkeypatch.setenv("SLURM_JOB_ID", "12")

    def run(end: BaseException | int) -> dict[str, object]:
        def work() -> int:
            ending.own(tmp_path)
            ending.step = 7
            if isinstance(end, int):
                return end
            raise end

        error_file.unlink(missing_ok=True)
        code = guard(work)
        ended = json.loads((tmp_path / "ended.json").read_text())
        assert (ended["code"], ended["step"], ended["job"]) == (code, 7, "12")
        if code:
            told = json.loads(error_file.read_text())["message"]
            assert told["message"] == f"{ended['reason']} (exit code {code})"
            assert told["extraInfo"]["py_callstack"] == told["message"], "torchrun's last lines"
            assert (told["extraInfo"]["code"], told["extraInfo"]["timestamp"].isdigit()) == (code, True)
        return ended

    assert run(0)["reason"] == "done"
    assert not error_file.exists()
    assert run(75)["reason"] == "stopped early"
    assert run(KeyboardInterrupt())["code"] == 130
    assert run(UsageError("give a prompt\nor two"))["reason"] == "give a prompt"
    monkeypatch.setenv("RANK", "1")
    assert run(ValueError("boom"))["rank"] == 1
    monkeypatch.setenv("RANK", "0")
    told = ReportedError("rank 1 failed: boom; this rank stops too")
    assert guard(lambda: ending.__setattr__("folder", tmp_path) or _fail(told)()) == 1
    assert json.loads((tmp_path / "ended.json").read_text())["reason"] == "boom", "the failing rank's"


def test_who_does_not_own_a_folder_writes_nothing_into_it(tmp_path, signals) -> None:
    assert guard(_fail(UsageError("another run writes here"))) == 2
    assert not list(tmp_path.iterdir())


def test_sigusr1_stops_like_sigterm_and_a_signal_after_the_end_changes_nothing(capsys, signals) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)

    def work() -> int:
        signal.raise_signal(signal.SIGUSR1)
        return 0

    assert guard(work, on_stop="go on so") == 130
    assert capsys.readouterr().err == "stopped by SIGUSR1; go on so\n"

    def saved() -> int:
        ending.seal()
        signal.raise_signal(signal.SIGTERM)  # torchrun's, when another rank has left
        return 75

    assert guard(saved) == 75
    signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().err == ""


def test_a_signal_while_the_interpreter_shuts_down_leaves_the_exit_code() -> None:
    """A training ended with -15 after it had saved: Python had put the handlers back to the default."""
    program = (
        "import os, signal, sys\n"
        "from sat.cli.main_guard import guard\n"
        "class Late:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGTERM)\n"
        "late = Late()\n"  # deleted with its module
        "sys.exit(guard(lambda: 75))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 75


@pytest.mark.parametrize("thread", [False, True])
def test_a_command_leaves_with_its_code_and_all_that_was_to_be_done_at_the_exit(thread: bool) -> None:
    program = (
        "import atexit, threading, time\n"
        "from sat.cli.main_guard import leave\n"
        "class Late:\n"
        "    def __del__(self): print('taken apart')\n"
        "late = Late()\n"
        "atexit.register(lambda: print('at exit'))\n"
        f"if {thread}: threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('told', end='; ')\n"
        "leave(75)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    usual = "told; thread\nat exit\ntaken apart\n"  # others may still work
    assert (ended.returncode, ended.stdout) == (75, usual if thread else "told; at exit\n")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "srun --ntasks=1 torchrun --standalone --nproc_per_node 2 train.py --base 'a b.yaml'",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"},
            "sbatch --nodes 2 train_scripts/sft.sbatch",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 tasks (OMPI_COMM_WORLD_SIZE)"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_STEP_NUM_TASKS": "2", "RANK": "0", "WORLD_SIZE": "2"}, ""),
        ({"SLURM_NTASKS": "2"}, ""),  # a shell of sbatch or salloc
    ],
)  # fmt: skip
def test_several_tasks_of_srun_without_ranks_are_refused(monkeypatch, given, says) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "PMI_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if not says:
        refuse_tasks("train.py", [])
        return
    with pytest.raises(UsageError) as refused:
        refuse_tasks("train.py", ["--base", "a b.yaml"])
    assert says in str(refused.value)


def test_a_task_other_than_the_first_does_not_repeat_the_refusal(capsys, monkeypatch, signals) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert guard(_fail(UsageError("srun started 2 tasks"))) == 2
    assert capsys.readouterr().err == ""

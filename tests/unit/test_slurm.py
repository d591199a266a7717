"""The SLURM scripts around a torchrun that notes how it was started: addresses, signals, queueing again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import NODES, Slurm, task, tell

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="two loopback addresses, as on Linux")

TORCHRUN = """#!/bin/bash
echo "$SLURMD_NODENAME $*" >>"$CALLS"
[[ -z $CODE ]] || exit "$CODE"
trap 'echo agent >>"$CALLS"; exit 1' TERM
bash -c 'trap "echo saved >>$CALLS; exit 0" TERM
    echo started >>$CALLS
    for _ in {1..600}; do sleep 0.05; done' &
wait $!
"""
TRAIN = ("train_scripts/sft.sbatch", "train.py", "--base", "a.yaml")


class Fake(Slurm):
    """Jobs whose torchrun is the script above; ``calls`` is what it noted."""

    def __init__(self, folder: Path) -> None:
        programs = folder / "bin"
        programs.mkdir()
        (programs / "torchrun").write_text(TORCHRUN)
        (programs / "torchrun").chmod(0o755)
        super().__init__(folder, programs)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *words: str, code: str = "", **more) -> subprocess.Popen[str]:
        return self.job(*words, CALLS=str(self.folder / "calls"), CODE=code, **more)

    def end(self, *words: str, code: str = "0", **more) -> tuple[int, str]:
        """Exit code and log of a job whose torchrun ends at once with ``code``."""
        job = self.start(*words, code=code, **more)
        said = job.communicate(timeout=30)[0]
        return job.returncode, said

    def told(self, *words: str, ranks: int = 1, **more) -> tuple[int, str]:
        """The same of a job that runs until it is told that its time is nearly over."""
        job = self.start(*words, **more)
        for _ in range(600):
            if self.calls.count("started") == ranks:
                break
            time.sleep(0.05)
        tell(job)
        said = job.communicate(timeout=30)[0]
        return job.returncode, said


@pytest.fixture
def slurm(tmp_path) -> Fake:
    return Fake(tmp_path)


def test_every_node_starts_torchrun_and_meets_at_the_first(slurm) -> None:
    code, said = slurm.end(*TRAIN, number=20017, nodes=NODES)
    assert code == 0, said
    assert sorted(slurm.calls) == [
        f"127.0.0.{node} --nproc_per_node 1 --local-addr 127.0.0.{node} --nnodes 2 --rdzv_backend c10d "
        f"--rdzv_id 20017 --rdzv_endpoint 127.0.0.1:10017 train.py --base a.yaml"
        for node in (1, 2)
    ]
    assert slurm.requeued == []


@pytest.mark.parametrize(
    ("given", "ranks"),
    [({"SLURM_GPUS_ON_NODE": "4"}, 4), ({"SLURM_GPUS_ON_NODE": "4", "RANKS_PER_NODE": "2"}, 2)],
)
def test_there_is_a_rank_for_every_gpu_or_as_many_as_asked(slurm, given, ranks) -> None:
    slurm.end(*TRAIN, **given)
    assert f"--nproc_per_node {ranks} " in slurm.calls[0]


def test_jobs_that_share_a_node_use_other_ports(slurm) -> None:
    slurm.end(*TRAIN, number=39999)
    slurm.end(*TRAIN, number=40000)
    assert ":29999 " in slurm.calls[0]
    assert ":10000 " in slurm.calls[1]


def test_a_failure_keeps_its_code_and_is_not_queued_again(slurm) -> None:
    assert slurm.end(*TRAIN, code="7")[0] == 7
    # Of several nodes the first to fail has the others ended by SIGTERM, and the worst code is told.
    assert slurm.end(*TRAIN, code="7", nodes=NODES)[0] in (7, 128 + signal.SIGTERM)
    assert slurm.requeued == []


@pytest.mark.parametrize("reach", ["task", "all"])
def test_the_signal_lets_ranks_save_and_queues_the_job_again(slurm, reach) -> None:
    """torchrun lives on, whether SLURM signals its tasks alone or all their processes."""
    code, said = slurm.told(*TRAIN, ranks=2, number=77, nodes=NODES, SIGNALS=reach)
    assert code == 0, said
    assert slurm.calls.count("saved") == 2
    assert "agent" not in slurm.calls
    assert "time is nearly over: queueing job 77 again" in said
    assert slurm.requeued == ["77"]


def test_a_task_of_an_array_is_queued_again_alone(slurm) -> None:
    code, said = slurm.told("sample_scripts/array.sbatch", "sample.py", number=70, **task(3, 4, 70))
    assert code == 0, said
    assert slurm.requeued == ["70_3"]


def test_a_job_is_not_queued_for_ever(slurm) -> None:
    code, said = slurm.told(*TRAIN, SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")
    assert code == 1
    assert "not queued again: restarted 2 times already (MAX_REQUEUES)" in said
    assert slurm.requeued == []


def test_a_restart_resumes_and_a_first_start_does_not(slurm) -> None:
    slurm.end(*TRAIN)
    slurm.end(*TRAIN, SLURM_RESTART_COUNT="1")
    slurm.end(TRAIN[0], "-m", "sat.cli.prepare", "cache", SLURM_RESTART_COUNT="1")
    assert [call.endswith("--resume") for call in slurm.calls] == [False, True, False]


def test_lora_needs_no_command_only_what_differs(slurm) -> None:
    slurm.end("train_scripts/lora.sbatch", "--output-dir", "OUT")
    assert slurm.calls[0].endswith("train.py --base configs/plus.yaml configs/lora.yaml --output-dir OUT")


def test_tasks_of_an_array_draw_shares(slurm) -> None:
    words = ("sample_scripts/array.sbatch", "sample.py", "--base", "a.yaml")
    for number in range(3):
        slurm.end(*words, **task(number, 3, 9))
    again = {**task(7, 2, 9), "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "7"}
    slurm.end(*words, **again, SHARES="16")
    shares = [call.partition("a.yaml sampling.share=")[2] for call in slurm.calls]
    assert shares == ["0/3", "1/3", "2/3", "7/16"]


@pytest.mark.parametrize(("least", "most"), [(1, 3), (0, 3)])
def test_an_array_that_would_leave_prompts_out_is_refused(slurm, least: int, most: int) -> None:
    given = {**task(2, 3, 9), "SLURM_ARRAY_TASK_MIN": str(least), "SLURM_ARRAY_TASK_MAX": str(most)}
    code, said = slurm.end("sample_scripts/array.sbatch", "sample.py", **given)
    assert code == 2
    assert "expected --array=0-N, or SHARES set" in said
    assert slurm.calls == []


def test_a_script_outside_of_slurm_says_what_it_needs(slurm) -> None:
    code, said = slurm.end(*TRAIN, SLURM_JOB_NODELIST="")
    assert code != 0
    assert "SLURM_JOB_NODELIST: start this with sbatch" in said
    assert slurm.calls == []

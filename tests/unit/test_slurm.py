"""The SLURM scripts around a torchrun that notes how it was started: addresses, signals, queueing again."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import NODES, Slurm, free_job, task, tell

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="two loopback addresses, as on Linux")

TORCHRUN = """#!/usr/bin/env python3
import os, re, signal, socket, subprocess, sys, time

calls = open(os.environ["CALLS"], "a", buffering=1)
words = " ".join(sys.argv[1:])
calls.write(f"{os.environ['SLURMD_NODENAME']} {words}\\n")
if "is_host=true" in words:  # the first of several nodes, which the second waits for
    host, port = re.search(r"endpoint (\\S+):(\\d+)", words).groups()
    server = socket.create_server((host, int(port)))
    server.accept()
if ended := os.environ.get("ENDED"):
    open(os.environ["RUN_END"], "w").write(ended)
if code := os.environ.get("CODE"):
    sys.exit(int(code))
rank = subprocess.Popen(["bash", "-c", '''trap "echo saved >>$CALLS; exit 0" TERM
    echo started >>$CALLS
    for _ in {1..600}; do sleep 0.05; done'''])
signal.signal(signal.SIGTERM, lambda *_: (calls.write("agent\\n"), sys.exit(1)))
rank.wait()
"""
PYTHON = """#!/bin/bash
[[ $1 != -c ]] || exec python3 "$@"
echo "$*" >>"$CALLS.checked"
[[ -z $CHECK ]] || { echo "error: $CHECK" >&2; exit 2; }
echo "its end: $RUN/${END:-ended.json}"
echo "run folder: $RUN"
"""
TRAIN = ("train_scripts/sft.sbatch", "train.py", "--base", "a.yaml")


class Fake(Slurm):
    """Jobs whose torchrun is the script above; ``calls`` is what it noted."""

    def __init__(self, folder: Path) -> None:
        programs = folder / "bin"
        programs.mkdir()
        for name, text in {"torchrun": TORCHRUN, "python": PYTHON}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        (folder / "run").mkdir()
        super().__init__(folder, programs)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def start(self, *words: str, code: str = "", **more) -> subprocess.Popen[str]:
        place = {"CALLS": str(self.folder / "calls"), "RUN": str(self.folder / "run")}
        return self.job(*words, CODE=code, **place, **more)

    def end(self, *words: str, code: str = "0", **more) -> tuple[int, str]:
        """Exit code and log of a job whose torchrun ends at once with ``code``."""
        job = self.start(*words, code=code, **more)
        said = job.communicate(timeout=30)[0]
        return job.returncode, said

    def told(self, *words: str, ranks: int = 1, **more) -> tuple[int, str]:
        """The same of a job that runs until it is told that its time is nearly over."""
        before = self.calls.count("started")
        job = self.start(*words, **more)
        for _ in range(600):
            if self.calls.count("started") == before + ranks:
                break
            time.sleep(0.05)
        tell(job)
        said = job.communicate(timeout=30)[0]
        return job.returncode, said


@pytest.fixture
def slurm(tmp_path) -> Fake:
    return Fake(tmp_path)


RANK = (
    "--no-python env -u TORCH_CPP_LOG_LEVEL -u TORCH_LOGS SAT_QUIET_STOP=1 python -u train.py --base a.yaml"
)


def test_every_node_starts_torchrun_and_meets_at_the_first(slurm) -> None:
    number = free_job()
    code, said = slurm.end(*TRAIN, number=number, nodes=NODES)
    assert code == 0, said
    assert sorted(slurm.calls) == [
        f"127.0.0.{node} --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id {number} "
        f"--rdzv_endpoint 127.0.0.1:{10000 + number % 20000} --local-addr 127.0.0.{node} "
        f"--rdzv_conf is_host={'true' if node == 1 else 'false'},join_timeout=30 {RANK}"
        for node in (1, 2)
    ]
    assert slurm.requeued == []


def test_one_node_needs_no_name_and_no_port_of_its_own(slurm) -> None:
    slurm.end(*TRAIN, number=7, nodes="a-name-that-does-not-resolve")
    assert slurm.calls == [
        "a-name-that-does-not-resolve --nnodes 1 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id 7 "
        f"--rdzv_endpoint 127.0.0.1:0 --local-addr 127.0.0.1 {RANK}"
    ]


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "RANKS_PER_NODE": ""}, 4),
        ({"SLURM_GPUS_ON_NODE": "4", "RANKS_PER_NODE": "2"}, 2),
        ({"SLURM_GPUS_PER_NODE": "0", "RANKS_PER_NODE": ""}, 1),
        ({"SLURM_GPUS": "0", "RANKS_PER_NODE": ""}, 1),
    ],
)
def test_there_is_a_rank_for_every_gpu_or_as_many_as_asked(slurm, given, ranks) -> None:
    slurm.end(*TRAIN, **given)
    assert f"--nproc_per_node {ranks} " in slurm.calls[0]


def test_a_job_that_asked_for_no_gpu_is_told_how(slurm) -> None:
    code, said = slurm.end(*TRAIN, RANKS_PER_NODE="")
    assert (code, slurm.calls) == (2, [])
    assert "the job has no GPU: sbatch --gpus-per-node=8 (or --gres=gpu:8, --gpus=8)" in said.splitlines()[-1]


def test_the_step_is_one_task_a_node_and_has_the_environment(slurm) -> None:
    """What the job asked for, and sbatch --export=NONE, do not reach srun."""
    asked = ["GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "NTASKS", "NTASKS_PER_NODE", "CPUS_PER_GPU",
             "MEM_PER_GPU", "TRES_PER_TASK", "EXPORT_ENV", "CPUS_PER_TASK"]  # fmt: skip
    slurm.end(*TRAIN, SRUN_SAYS=str(slurm.folder / "srun"), **{f"SLURM_{name}": "2" for name in asked})
    options, *left = (slurm.folder / "srun").read_text().splitlines()
    assert "--ntasks=1 --ntasks-per-node=1 " in options and "--export=ALL " in options
    assert not {line.partition("=")[0] for line in left} & {f"SLURM_{name}" for name in asked}


def test_a_taken_port_is_passed_over(slurm) -> None:
    number = free_job()
    with socket.create_server(("127.0.0.1", 10000 + number % 20000)):
        code, said = slurm.end(*TRAIN, number=number, nodes=NODES)
    assert code == 0, said
    assert f"port {10000 + number % 20000} of 127.0.0.1 is taken, trying the next" in said
    assert f"--rdzv_endpoint 127.0.0.1:{10001 + number % 20000} " in slurm.calls[0]


def test_several_nodes_whose_names_do_not_resolve_are_told_so_last(slurm) -> None:
    code, said = slurm.end(*TRAIN, nodes="127.0.0.[1-2]x", SLURM_JOB_NUM_NODES="2")
    assert (code, slurm.calls) == (1, [])
    assert re.search(
        r"ended with code 1: \S+: the name 127.0.0.1x does not resolve here", said.splitlines()[-1]
    )


def test_a_mistake_ends_the_job_before_any_node_starts(slurm) -> None:
    code, said = slurm.end(*TRAIN, CHECK="no such key")
    assert (code, said.splitlines()[-1], slurm.calls) == (2, "error: no such key", [])


def test_a_job_without_an_environment_says_where_to_activate_one(slurm) -> None:
    bare = ":".join(folder for folder in slurm.path.split(":") if not (Path(folder) / "torchrun").exists())
    code, said = slurm.end(*TRAIN, PATH=bare)
    assert code == 2
    assert said.splitlines()[-1].startswith(
        "error: no torchrun in the job: activate the environment in train_sc"
    )


def test_a_site_file_gives_jobs_their_environment_and_container(slurm) -> None:
    (slurm.folder / "site.sh").write_text('CONTAINER="env INSIDE=yes"\nexport TORCH_CPP_LOG_LEVEL=INFO\n')
    code, said = slurm.end(*TRAIN, SAT_SITE=str(slurm.folder / "site.sh"))
    assert code == 0, said
    assert "-u TORCH_LOGS TORCH_CPP_LOG_LEVEL=INFO SAT_QUIET_STOP=1 python -u train.py" in slurm.calls[0]
    code, said = slurm.end(*TRAIN, SAT_SITE=str(slurm.folder / "none.sh"))
    assert code != 0 and "none.sh: No such file" in said


def test_a_failure_keeps_its_code_and_is_not_queued_again(slurm) -> None:
    assert slurm.end(*TRAIN, code="7")[0] == 7
    # Of several nodes the first to fail has the others ended by SIGTERM, and the worst code is told.
    assert slurm.end(*TRAIN, code="7", nodes=NODES)[0] in (7, 128 + signal.SIGTERM)
    assert slurm.requeued == []


@pytest.mark.parametrize(("own", "seen"), [(75, 75), (2, 2), (0, 1)])
def test_the_code_and_the_reason_are_the_runs_own(slurm, own: int, seen: int) -> None:
    ended = json.dumps({"code": own, "reason": 'stopped "early"', "step": 3, "time": "now"})
    code, said = slurm.end(*TRAIN, code="1", ENDED=ended)
    assert code == seen
    assert said.splitlines()[-1].endswith(f'ended with code {seen}: stopped "early"')
    assert slurm.end(*TRAIN, code="1", ENDED=ended, END="ended-1-of-2.json")[0] == seen, "another share's"
    code, said = slurm.end(*TRAIN, code="1", ENDED=ended)  # the same file again: not this job's
    assert code == 1 and "the reason stands above" in said.splitlines()[-1]


@pytest.mark.parametrize("reach", ["task", "all"])
def test_the_signal_lets_ranks_save_and_queues_the_job_again(slurm, reach) -> None:
    """torchrun lives on, whether SLURM signals its tasks alone or all their processes."""
    code, said = slurm.told(*TRAIN, ranks=2, number=free_job(), nodes=NODES, SIGNALS=reach)
    assert code == 75, said
    assert slurm.calls.count("saved") == 2
    assert "agent" not in slurm.calls
    (number,) = slurm.requeued
    assert f"time is nearly over: queueing job {number} again" in said


def test_a_run_that_fails_after_the_signal_is_not_queued_again(slurm) -> None:
    ended = json.dumps({"code": 1, "reason": "no space left", "step": 3, "time": "now"})
    code, said = slurm.told(*TRAIN, ENDED=ended)
    assert code == 1 and said.splitlines()[-1].endswith("no space left")
    assert slurm.requeued == []


def test_a_task_of_an_array_is_queued_again_alone(slurm) -> None:
    code, said = slurm.told("sample_scripts/array.sbatch", "sample.py", number=70, **task(3, 4, 70))
    assert code == 75, said
    assert slurm.requeued == ["70_3"]


def test_a_job_is_not_queued_for_ever(slurm) -> None:
    code, said = slurm.told(*TRAIN, SLURM_RESTART_COUNT="2", MAX_REQUEUES="2")
    assert code == 75
    assert "not queued again: restarted 2 times already (MAX_REQUEUES)" in said
    assert slurm.requeued == []


def test_a_restart_without_progress_is_the_last(slurm) -> None:
    assert slurm.told(*TRAIN)[0] == 75 and len(slurm.requeued) == 1  # the first start may be unlucky
    code, said = slurm.told(*TRAIN, SLURM_RESTART_COUNT="1")
    assert code == 1 and len(slurm.requeued) == 1
    assert re.search(
        "not queued again: restart 1 left nothing new in .*run before its time", said.splitlines()[-1]
    )


def test_a_restart_resumes_and_a_first_start_does_not(slurm) -> None:
    slurm.end(*TRAIN)
    slurm.end(*TRAIN, SLURM_RESTART_COUNT="1")
    slurm.end(TRAIN[0], "-m", "sat.cli.prepare", "cache", SLURM_RESTART_COUNT="1")
    assert [call.endswith("--resume") for call in slurm.calls] == [False, True, False]


def test_lora_needs_no_command_only_what_differs(slurm) -> None:
    slurm.end("train_scripts/lora.sbatch", "--output-dir", "OUT")
    slurm.end("train_scripts/lora.sbatch", "--base", "configs/tiny.yaml", "configs/lora.yaml", "--steps", "2")
    ends = ["--base configs/plus.yaml configs/lora.yaml --output-dir OUT",
            "--base configs/tiny.yaml configs/lora.yaml --steps 2"]  # fmt: skip
    assert [call.partition(" train.py ")[2] for call in slurm.calls] == ends


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


def test_the_check_before_ranks_demands_every_file_and_names_the_run_folder(capsys) -> None:
    from sat.cli import sample, train

    files = ["configs/tiny.yaml", "configs/sft.yaml", "configs/tiny_sft.yaml"]
    words = {
        train.main: ["--base", *files],
        sample.main: ["--base", "configs/tiny.yaml", "--prompt", "a cat"],
    }
    for main, given in words.items():
        assert main([*given, "--check-inputs", "--output-dir", "OUT"]) == 0
        assert capsys.readouterr().out.splitlines()[-2:] == ["its end: OUT/ended.json", "run folder: OUT"]
        assert main([*given, "--check", "checkpoint.model=none"]) == 0
        capsys.readouterr()
        assert main([*given, "--check-inputs", "checkpoint.model=none"]) == 2
        assert "there is no 'none'" in capsys.readouterr().err
    assert sample.main([*given, "--check-inputs", "--output-dir", "OUT", "sampling.share=1/3"]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "its end: OUT/ended-1-of-3.json"


def test_a_rank_that_stops_early_leaves_its_code_in_the_run_folder_alone(tmp_path, monkeypatch) -> None:
    from sat.cli.main_guard import guard
    from sat.util.ending import ending

    def work() -> int:
        ending.own(tmp_path)
        return 75

    assert guard(work) == 75
    monkeypatch.setenv("SAT_QUIET_STOP", "1")
    assert guard(work) == 0
    assert json.loads((tmp_path / "ended.json").read_text())["code"] == 75
    assert guard(lambda: 75) == 75  # nobody would know

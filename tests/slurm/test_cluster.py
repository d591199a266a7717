"""The SLURM scripts on a real SLURM of two nodes (``cluster.sh``), with the toy model; by hand and at night.

``REAL_SLURM=1 pytest tests/slurm`` as root, with Debian's slurm-wlm, munge and iproute2. ``SLURM_TABLE=FILE``
gets the table of jobs and results of docs/slurm.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm import ROOT

LACKING = [name for name in ("slurmctld", "slurmd", "munged", "ip", "nsenter") if shutil.which(name) is None]
REASON = (
    "set REAL_SLURM=1 (minutes)"
    if not os.environ.get("REAL_SLURM")
    else "needs root"
    if os.geteuid()
    else f"needs {', '.join(LACKING)}: apt-get install slurm-wlm munge iproute2"
    if LACKING
    else ""
)
pytestmark = [
    pytest.mark.skipif(bool(REASON), reason=f"a real SLURM: {REASON}"),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

SFT = "train_scripts/sft.sbatch"
TRAIN = """\
train:
  objective: {target: sat.train.objectives.diffusion.DiffusionObjective, params: {train_text: true}}
  steps: 12
  batch_size: 2
  accumulate: 1
  dtype: fp32
  zero: 0
  log_every: 1
  save_every: 100000
  validate_every: null
  sample_every: null
  wandb: disabled
data:
  sources: [{path: data/emoji_sample}]
  height: 48
  width: 64
  workers: 0
parallel: {device: cpu}
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass
class Job:
    """A submitted job and its log."""

    cluster: Cluster
    number: str
    log: Path
    began: float = field(default_factory=time.monotonic)

    def facts(self) -> dict[str, str]:
        """Output of ``scontrol show job``."""
        told = self.cluster.run("scontrol", "show", "job", "-o", self.number.partition("_")[0], check=False)
        lines = [
            line for line in told.splitlines() if f"JobId={self.number} " in line or "_" not in self.number
        ]
        return dict(re.findall(r"(\w+)=(\S*)", lines[0])) if lines else {}

    def until(self, ready: Callable[[], bool], seconds: float = 240) -> None:
        """Wait until ``ready``; fails with the log after ``seconds``."""
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"{self.facts()}\n{self.said}"
            time.sleep(0.5)

    def end(self, seconds: float = 240) -> tuple[str, int]:
        """Final state and exit code of the job's script."""
        self.until(lambda: self.facts().get("JobState") in ENDED, seconds)
        facts = self.facts()
        return facts["JobState"], int(facts["ExitCode"].partition(":")[0])

    def stepping(self, count: int = 3) -> None:
        """Wait until ``count`` steps are trained."""
        self.until(lambda: len(re.findall(r"^step \d+/", self.said, re.MULTILINE)) >= count)

    def requeued(self, restarts: int = 1) -> None:
        """Wait until the job is in the queue again, and have it start without SLURM's two minutes."""
        self.until(lambda: self.facts().get("Restarts") == str(restarts))
        if self.facts()["JobState"] == "PENDING":
            self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def last(self) -> str:
        return self.said.rstrip().splitlines()[-1] if self.said.strip() else ""


@dataclass
class Cluster:
    """The cluster, and a clone in the home of its user."""

    folder: Path
    clone: Path
    rows: list[tuple[str, str, str, float]] = field(default_factory=list)

    def script(self, *words: str) -> list[str]:
        return [str(ROOT / "tests" / "slurm" / "cluster.sh"), words[0], str(self.folder), *words[1:]]

    def run(self, *words: str, check: bool = True, **more: str) -> str:
        """Output of ``words``, run as the user in the clone with the environment active."""
        path = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin"
        given = [f"{name}={value}" for name, value in {"PATH": path, "OMP_NUM_THREADS": "1", **more}.items()]
        command = self.script("in", "env", *given, *words)
        done = subprocess.run(command, cwd=self.clone, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout + (done.stderr if not check else "")

    def on(self, node: str, *words: str) -> str:
        """Output of ``words``, run as root on ``node``."""
        done = subprocess.run(self.script("on", node, *words), capture_output=True, text=True, check=False)
        return done.stdout

    def sbatch(self, *words: str, **more: str) -> Job:
        """Submit; the log is named after the number."""
        number = self.run("sbatch", "--parsable", *words, **more).strip()
        array = any(word.startswith("--array") for word in words)
        return Job(self, number, self.clone / f"slurm-{number}{'_0' * array}.out")

    def row(self, what: str, command: str, result: str, job: Job) -> None:
        """A line of the table of jobs."""
        self.rows.append((what, command, result, time.monotonic() - job.began))

    def names(self, *lines: str) -> None:
        """Give both nodes the host names ``lines`` beside localhost."""
        for node in (1, 2):  # in place: the file is mounted
            (self.folder / f"hosts{node}").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(os.environ.get("SLURM_CLUSTER", "/tmp/sat-slurm"))
    script = str(ROOT / "tests" / "slurm" / "cluster.sh")
    shutil.rmtree(folder / "home", ignore_errors=True)
    subprocess.run([script, "down", str(folder)], check=False)
    subprocess.run([script, "up", str(folder), sys.executable], check=True)
    clone = folder / "home" / "clone"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name)
    (folder / "home" / "train.yaml").write_text(TRAIN)
    subprocess.run(["chown", "-R", "4242:4242", str(folder / "home")], check=True)
    made = Cluster(folder, clone)
    yield made
    subprocess.run([script, "down", str(folder)], check=False)
    if table := os.environ.get("SLURM_TABLE"):
        lines = [
            f"| {what} | `{command}` | {result} | {took:.0f} |" for what, command, result, took in made.rows
        ]
        head = ["| job | options and script | result | s |", "|---|---|---|---|"]
        Path(table).write_text("\n".join([*head, *lines]) + "\n")


def train(run: str, *more: str) -> tuple[str, ...]:
    """A training command of the toy model."""
    return ("train.py", "--base", "configs/debug.yaml", "../train.yaml", "--output-dir", f"runs/{run}", *more)


def facts(cluster: Cluster, run: str) -> dict:
    return json.loads((cluster.clone / "runs" / run / "run.json").read_text())


LONG = ("--steps", "100000")


@pytest.mark.parametrize(
    ("asked", "ranks", "cpus"),
    [
        (("--gres=gpu:2",), 2, 8),
        (("--gpus=2",), 2, 8),
        (("--gpus-per-node=1", "--mem=2G", "--ntasks-per-node=4"), 1, 4),
        (("--ntasks=2", "--gpus-per-task=1", "--mem-per-gpu=1G"), 2, 8),
        (("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"), 4, 16),
        (("--gpus-per-node=0",), 1, 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_gpus_may_be_asked_for_in_every_form(cluster, asked, ranks, cpus) -> None:
    run = "form" + re.sub(r"\W+", "_", "".join(asked))
    job = cluster.sbatch(*asked, SFT, *train(run, "--steps", "3"))
    assert job.end() == ("COMPLETED", 0), job.said
    told = facts(cluster, run)
    assert (told["world"], told["slurm"]["job"], told["slurm"]["restarts"]) == (ranks, job.number, 0)
    assert job.facts()["NumCPUs"] == str(cpus)
    assert "Traceback" not in job.said
    cluster.row("GPUs asked for", f"{' '.join(asked)} sft.sbatch", f"{ranks} ranks, {cpus} CPUs, code 0", job)


def test_a_job_without_gpus_is_told_how_to_ask(cluster) -> None:
    job = cluster.sbatch(SFT, *train("none"))
    assert job.end() == ("FAILED", 2), job.said
    assert "the job has no GPU: sbatch --gpus-per-node=8" in job.last
    cluster.row(
        "no GPU asked for",
        "sft.sbatch",
        "code 2; last line: the job has no GPU: sbatch --gpus-per-node=8 …",
        job,
    )


def test_an_empty_environment_needs_a_site_file(cluster) -> None:
    bare = ("--export=NONE", "--gpus=1", SFT)
    job = cluster.sbatch(*bare, *train("bare"))
    assert job.end() == ("FAILED", 2), job.said
    assert "no torchrun in the job: activate the environment in train_scripts/site.sh" in job.last
    cluster.row(
        "no environment",
        "--export=NONE --gpus=1 sft.sbatch",
        "code 2; last line: no torchrun in the job: …",
        job,
    )
    site = cluster.clone / "train_scripts" / "site.sh"
    site.write_text(f"source {sys.prefix}/bin/activate\nexport OMP_NUM_THREADS=1 CONTAINER='env BOX=1'\n")
    try:
        job = cluster.sbatch(*bare, *train("bare"))
        assert job.end() == ("COMPLETED", 0), job.said
    finally:
        site.unlink()
    cluster.row("no environment, with site.sh", "--export=NONE --gpus=1 sft.sbatch", "code 0", job)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("train.stepz=3",), "did you mean 'train.steps'"),
        (("checkpoint.model=weights/absent",), "weights/absent"),
    ],
)
def test_a_mistake_ends_the_job_at_once_and_stands_last(cluster, more, told) -> None:
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=8", SFT, *train("typo", *more))
    assert job.end() == ("FAILED", 2), job.said
    assert told in job.last
    cluster.row(
        "a mistake",
        f"--nodes=2 --gpus-per-node=8 sft.sbatch … {more[0]}",
        f"code 2; last line: {job.last}",
        job,
    )


def test_names_that_do_not_resolve_matter_to_several_nodes_alone(cluster) -> None:
    cluster.names()
    try:
        one = cluster.sbatch("--gpus=1", SFT, *train("nameless"))
        assert one.end() == ("COMPLETED", 0), one.said
        cluster.row("node names that do not resolve", "--gpus=1 sft.sbatch", "code 0", one)
        two = cluster.sbatch("--nodes=2", "--gpus-per-node=1", SFT, *train("nameless2"))
        assert two.end() == ("FAILED", 1), two.said
    finally:
        cluster.names("10.77.0.1 head", "10.77.0.11 node1", "10.77.0.12 node2")
    assert re.search(r"code 1: node\d: the name node1 does not resolve here", two.last)
    result = "code 1; last line: node2: the name node1 does not resolve here …"
    cluster.row("the same on two nodes", "--nodes=2 --gpus-per-node=1 sft.sbatch", result, two)


def test_a_taken_port_is_passed_over(cluster) -> None:
    """A program that takes connections and does not answer, on every port of the next jobs."""
    first = 10000 + int(cluster.sbatch("--gpus=0", "--wrap", "true").number) % 20000
    listens = (
        "import socket, time\ns = [socket.create_server(('', {0} + n)) for n in (0, 1, 2)]\ntime.sleep(99)"
    )
    squat = subprocess.Popen(cluster.script("on", "node1", sys.executable, "-c", listens.format(first + 1)))
    try:
        time.sleep(2)
        job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", SFT, *train("port"))
        assert job.end() == ("COMPLETED", 0), job.said
    finally:
        squat.kill()
    assert "of node1 is taken, trying the next" in job.said
    cluster.row(
        "a port that is taken", "--nodes=2 --gpus-per-node=1 sft.sbatch", "the next free one; code 0", job
    )


def test_a_firewall_between_nodes_is_told_in_time(cluster) -> None:
    wall = ("to", "10.77.0.11", "ipproto", "tcp", "dport", "10000-31999", "prohibit")
    cluster.on("node2", "ip", "rule", "add", *wall)
    try:
        job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", SFT, *train("wall"), MEET_TIMEOUT="20")
        assert job.end() == ("FAILED", 1), job.said
    finally:
        cluster.on("node2", "ip", "rule", "del", *wall)
    assert "node2: node1 does not answer at port" in job.last
    result = (
        "code 1; last line: node2: node1 does not answer at port … after 20 s (MEET_TIMEOUT): a firewall …"
    )
    cluster.row(
        "nodes that cannot reach each other",
        "MEET_TIMEOUT=20, --nodes=2 --gpus-per-node=1 sft.sbatch",
        result,
        job,
    )


def test_the_signal_saves_requeues_and_resumes_and_dependants_wait(cluster) -> None:
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", SFT, *train("twice", *LONG))
    after = cluster.sbatch(f"--dependency=afterok:{job.number}", "--gpus=0", "--wrap", "true")
    job.stepping()
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.requeued()
    assert "c10::" not in job.said and "Traceback" not in job.said
    assert after.facts()["JobState"] == "PENDING"
    job.until(lambda: "resumed from" in job.said)
    cluster.row(
        "two nodes, told that time is over", "scancel --batch --signal=USR1", "saved, requeued, resumed", job
    )
    told = facts(cluster, "twice")
    assert (told["slurm"]["restarts"], told["slurm"]["nodes"]) == (1, "node[1-2]")
    assert [start["slurm"]["restarts"] for start in told["starts"]] == [0]
    # A10: the ranks alone are told; the run stops early, and nobody may take it for done.
    job.until(
        lambda: len(re.findall(r"^step \d+/", job.said.rpartition("resumed from")[2], re.MULTILINE)) > 2
    )
    cluster.run("scancel", "--signal=USR1", job.number)
    assert job.end() == ("FAILED", 75), job.said
    assert "stopped" in job.last or "asked to stop" in job.last
    time.sleep(3)
    assert after.facts()["JobState"] == "PENDING" and "Dependency" in after.facts()["Reason"]
    cluster.run("scancel", after.number)
    result = f"code 75; afterok does not go on; last line: {job.last}"
    cluster.row("ranks told to stop, not the script", "scancel --signal=USR1", result, job)


def test_a_job_that_makes_no_progress_is_not_queued_for_ever(cluster) -> None:
    job = cluster.sbatch("--gpus=1", SFT, *train("stuck", *LONG))
    for restart in (1, 2):
        job.until(lambda count=restart: job.said.count("config ok") == count)  # before the first step
        cluster.run("scancel", "--batch", "--signal=USR1", job.number)
        if restart == 1:
            job.requeued()
    assert job.end() == ("FAILED", 1), job.said
    assert "not queued again: restart 1 left nothing new in runs/stuck" in job.last
    result = "requeued once, then code 1; last line: not queued again: restart 1 left nothing new …"
    cluster.row(
        "time shorter than the start, twice",
        "scancel --batch --signal=USR1 before the first step",
        result,
        job,
    )


def test_a_preempted_job_saves_and_waits(cluster) -> None:
    job = cluster.sbatch("--nodes=2", "--exclusive", "--gpus-per-node=1", SFT, *train("preempted", *LONG))
    job.stepping()
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 2")
    job.requeued()
    assert "time is nearly over" in job.said
    assert urgent.end()[0] == "COMPLETED"
    job.until(lambda: "resumed from" in job.said)
    cluster.run("scancel", job.number)
    job.end()
    cluster.row(
        "preempted (GraceTime 60, preempt_send_user_signal)",
        "--partition=urgent --exclusive",
        "saved, requeued, resumed",
        job,
    )


def test_a_step_of_several_tasks_is_refused_wherever_it_starts(cluster) -> None:
    """``srun -n2 python train.py`` would be two trainings into one folder."""
    job = cluster.sbatch("--ntasks=2", "--wrap", "srun -n2 python " + " ".join(train("doubled")))
    state, code = job.end()
    assert (state, code) == ("FAILED", 2), job.said
    assert not (cluster.clone / "runs" / "doubled" / "metrics.jsonl").exists()
    cluster.row(
        "two tasks without a launcher",
        "--ntasks=2 --wrap 'srun -n2 python train.py …'",
        f"code 2: {job.last}",
        job,
    )
    for words in (("srun", "-n2"), ("salloc", "-n2", "srun", "-n2")):
        said = cluster.run(*words, "python", *train("doubled"), check=False)
        assert "torchrun" in said or "srun" in said
        assert not (cluster.clone / "runs" / "doubled" / "metrics.jsonl").exists(), said
        cluster.row("the same", f"{' '.join(words)} python train.py …", "refused", job)


def test_salloc_runs_the_scripts_too(cluster) -> None:
    job = Job(cluster, "0", cluster.clone / "none")
    said = cluster.run("salloc", "--nodes=2", "--gpus-per-node=1", "bash", SFT, *train("salloc"), check=False)
    assert facts(cluster, "salloc")["world"] == 2, said
    assert "saved runs/salloc" in said
    cluster.row("salloc", "salloc --nodes=2 --gpus-per-node=1 bash sft.sbatch", "2 ranks, code 0", job)


def test_an_array_draws_every_prompt_once(cluster) -> None:
    (cluster.clone / "prompts.txt").write_text("a red apple\na blue car\nthe sun\n")
    sample = (
        "sample.py",
        "--base",
        "configs/debug.yaml",
        "parallel.device=cpu",
        "--prompt-file",
        "prompts.txt",
    )
    where = ("--output-dir", "outputs/array", "--batch-size", "1")
    job = cluster.sbatch("--array=0-1", "--gpus=1", "sample_scripts/array.sbatch", *sample, *where)
    logs = [cluster.clone / f"slurm-{job.number}_{task}.out" for task in range(2)]
    job.until(lambda: not cluster.run("squeue", "-h", "-j", job.number, check=False).strip())
    pictures = {path.parent.name for path in (cluster.clone / "outputs" / "array").rglob("0*.png")}
    assert len(pictures) == 3, "\n".join(log.read_text() for log in logs)
    cluster.row("array", "--array=0-1 --gpus=1 array.sbatch", "every prompt once, code 0", job)


def test_a_killed_rank_and_a_dead_node_end_or_restart_the_job(cluster) -> None:
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=1", SFT, *train("killed", *LONG, "train.save_every=5"))
    job.stepping(6)
    pids = [word for word in cluster.on("node2", "pgrep", "-f", "python -u train.py").split() if word]
    for pid in pids:
        if "RANK=1" in cluster.on("node2", "cat", f"/proc/{pid}/environ").replace("\0", "\n").splitlines():
            cluster.on("node2", "kill", "-9", pid)
    state, code = job.end()
    assert state == "FAILED" and code != 0, job.said
    assert "ended with code" in job.last
    assert list((cluster.clone / "runs" / "killed" / "checkpoints").rglob("COMPLETE"))
    cluster.row(
        "kill -9 of the second node's rank",
        "--nodes=2 --gpus-per-node=1 sft.sbatch",
        f"FAILED, code {code}; {job.last}",
        job,
    )

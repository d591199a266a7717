"""The SLURM scripts with the real torchrun: two nodes train, stop, go on; an array draws a file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sat.train.resume import RunFolder, torn
from tests.checkpoints import tokenizer
from tests.configs import DEBUG
from tests.sampling import files, pixels
from tests.slurm import NODES, Slurm, free_job, task, tell
from tests.smoke.training_runs import write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="two loopback addresses, as on Linux")

QUICK = (
    "train.sample_every=null",
    "train.validate_every=null",
    "train.save_every=100000",
    "train.accumulate=1",
)


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizer") / "spiece.model")


def steps(run: Path) -> list[int]:
    return [saved.step for saved in RunFolder(run).saved()]


def unchecked(folder: Path) -> Slurm:
    """Jobs without the check before the ranks, which one job has already: it imports torch once more."""
    programs = folder / "bin"
    programs.mkdir()
    text = f'#!/bin/bash\n[[ " $* " == *" --check-inputs "* ]] || exec {sys.executable} "$@"\n'
    (programs / "python").write_text(text)
    (programs / "python").chmod(0o755)
    return Slurm(folder, programs)


def end(job: subprocess.Popen[str], code: int = 0) -> str:
    said = job.communicate(timeout=200)[0]
    assert job.returncode == code, said
    return said


def test_a_job_of_two_nodes_saves_in_time_is_queued_again_and_goes_on(spiece, tmp_path) -> None:
    slurm, run, number = Slurm(tmp_path), tmp_path / "run", free_job()
    words = ("train_scripts/sft.sbatch", "train.py", *write(tmp_path, spiece), "--output-dir", run, *QUICK)
    place = {"number": number, "nodes": NODES, "SIGNALS": "all"}
    job = slurm.job(*words, "--steps", "100000", "--max-minutes", "5", **place)
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    assert json.loads((run / "run.json").read_text())["world"] == 2
    assert steps(run) == []
    tell(job)
    said = end(job, code=75)
    (stopped,) = steps(run)
    assert f"asked to stop: saving at step {stopped} of 100000" in said
    assert slurm.requeued == [str(number)]
    again = unchecked(tmp_path).job(*words, "--steps", str(stopped + 2), SLURM_RESTART_COUNT="1", **place)
    said = end(again)
    assert re.search(rf"resumed from .* at step {stopped} of {stopped + 2}", said), said
    assert steps(run)[-1] == stopped + 2
    told = json.loads((run / "run.json").read_text())
    assert (told["slurm"]["restarts"], told["starts"][0]["slurm"]["restarts"]) == (1, 0)
    assert not any(torn(path) for path in (run / "checkpoints").iterdir())
    assert slurm.requeued == [str(number)]


def test_the_tasks_of_an_array_draw_every_prompt_once(spiece, tmp_path) -> None:
    (tmp_path / "prompts.txt").write_text("a red apple\na blue car\n\nthe sun\n")
    words = [
        "sample.py", "--base", DEBUG, f"conditioning.tokenizer={spiece}", "parallel.device=cpu",
        "--prompt-file", tmp_path / "prompts.txt", "--batch-size", "2",
    ]  # fmt: skip
    slurm = unchecked(tmp_path)
    whole = slurm.job("sample_scripts/plus.sbatch", *words, "--output-dir", tmp_path / "whole")
    first = free_job()
    tasks = [
        slurm.job(
            "sample_scripts/array.sbatch", *words, "--output-dir", tmp_path / "shares",
            number=first + number, **task(number, 2, first),
        )
        for number in range(2)
    ]  # fmt: skip
    written = [int(re.findall(r"(\d+) files written", end(job))[0]) for job in (whole, *tasks)]
    assert written == [9, 6, 3]  # two pictures and a grid a prompt
    assert files(tmp_path / "shares") == files(tmp_path / "whole")
    assert slurm.requeued == []


def test_two_nodes_draw_every_picture_together(spiece, tmp_path) -> None:
    words = [
        "sample.py", "--base", DEBUG, "configs/sequence2.yaml", f"conditioning.tokenizer={spiece}",
        "parallel.device=cpu", "--prompt", "a red apple", "--batch-size", "2",
    ]  # fmt: skip
    slurm = unchecked(tmp_path)
    alone = [*words, "parallel.sequence=1", "--output-dir", tmp_path / "one"]
    jobs = [
        slurm.job("sample_scripts/plus.sbatch", *words, "--output-dir", tmp_path / "two", nodes=NODES),
        slurm.job("sample_scripts/plus.sbatch", *alone),
    ]
    assert "(sequence 2)" in [end(job) for job in jobs][0]
    drawn = sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.png"))
    assert len(drawn) == 3
    for name in drawn:
        assert abs(pixels(tmp_path / "two" / name) - pixels(tmp_path / "one" / name)).max() <= 1

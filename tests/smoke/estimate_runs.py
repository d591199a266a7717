"""Short trainings beside their estimates, each in a fork of one process.

``python -m tests.smoke.estimate_runs FOLDER CONFIGS SETTINGS`` prints the two peaks of one training, of the
first rank with ``parallel.AXIS=N``; without configs those of :data:`RUNS` and :data:`TEAMS` go to
FOLDER/peaks.json.

The same training runs first for a step, so that libraries are loaded, their kernels built and their scratch
space taken: what the process holds then is not the training's. Large buffers come from the system and go back
to it (the environment's ``MALLOC_MMAP_THRESHOLD_``, ``train.allocator=false``): what is in use counts.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import math
import re
import sys
from pathlib import Path

import torch

from sat.cli.train import main
from sat.config.load import load
from sat.parallel.launch import Runtime
from sat.train.estimate import Estimator
from tests.configs import ROOT
from tests.training import ranks

_TINY = ["configs/tiny.yaml", "configs/tiny_train.yaml"]
# Mostly in float32: some processors compute bf16 by slow loops, and its buffers depend on the processor.
RUNS = {
    "plus": [*_TINY, "train.batch_size=32"],
    "offload": [
        *_TINY, "train.batch_size=48", "train.dtype=fp32", "train.zero=3",
        "train.offload={optimizer: true, parameters: true}",
    ],
    "unet": [
        "configs/tiny_base.yaml", "configs/tiny_base_train.yaml", "train.batch_size=96", "train.dtype=fp32",
        "train.zero=0",
    ],
    "roles": [  # student, critic and teacher
        "configs/tiny.yaml", "configs/matching.yaml", "adapters.lora=null", "train.batch_size=48",
        "train.steps=3",
        "train.accumulate=1", "train.dtype=fp32", "train.zero=0", "train.objective.params.steps=1",
        "train.objective.params.student_every=2", "train.activation_checkpointing=false", "data.height=64",
        "data.width=64",
    ],
    "factors": [  # student and critic as two sets of factors, each with its optimizer's state
        "configs/tiny.yaml", "configs/matching.yaml", "train.batch_size=48", "train.steps=3",
        "train.accumulate=1", "train.dtype=fp32", "train.zero=0", "train.objective.params.steps=1",
        "train.objective.params.student_every=2", "train.activation_checkpointing=false", "data.height=64",
        "data.width=64", "train.pack=false",
    ],
    "toy": [
        "configs/debug.yaml", "configs/tiny_train.yaml", "train.batch_size=384", "train.dtype=fp32",
        "train.zero=0", "data.height=48", "data.width=64", "checkpoint.first_stage=null",
    ],
}  # fmt: skip
_TEAM = [*_TINY, "train.batch_size=32", "train.dtype=fp32"]
TEAMS = {axis: [*_TEAM, f"parallel.{axis}=2"] for axis in ("tensor", "sequence")}
SAME = [
    "parallel.device=cpu", "train.allocator=false", "train.wandb=disabled", "train.warmup=0", "train.steps=2",
    f"data.sources=[{{path: {ROOT}/data/emoji_sample}}]", "data.validation=[]", "train.validate_every=null",
    "train.sample_every=null", "data.cache_views=0", "data.workers=0",
]  # fmt: skip


def resident(name: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def measured(folder: Path, base: list[str], settings: list[str]) -> int:
    """The most bytes of a run beside what the process holds before it."""
    words = ["--base", *base, *SAME, *settings]
    assert main([*words, "train.steps=1", "--output-dir", str(folder / "warm")]) == 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    assert main([*words, "--output-dir", str(folder / "run")]) == 0
    return resident("VmHWM") - before


def on_rank(runtime: Runtime, folder: Path, base: list[str], settings: list[str]) -> int:
    """The same on a rank, whose process group serves both runs."""
    Runtime.close = lambda self: None  # type: ignore[method-assign]
    return measured(folder, base, settings)


def peak(folder: Path, count: int, words: list[str]) -> int:
    """The same of the first of ``count`` ranks, forked from this process, which only imports."""
    import deepspeed  # noqa: F401

    base, settings = split(words)
    first, *_ = ranks(count, folder, functools.partial(on_rank, base=base, settings=settings), timeout=300.0)
    assert first["code"] == 0, first
    found: int = first["value"]
    return found


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Config files and settings."""
    files = [word for word in words if word.endswith(".yaml")]
    return files, [word for word in words if word not in files]


def run(folder: Path, words: list[str]) -> None:
    """What the command line asks for."""
    axes = re.findall(r"^parallel\.(?:tensor|sequence|guidance)=(\d+)$", "\n".join(words), re.MULTILINE)
    count = math.prod(map(int, axes))
    cases = {"": (count, words)} if words else {name: (1, its) for name, its in RUNS.items()}
    if not words and torch.__version__ >= "2.6":  # before, collectives want data, which an estimate has not
        cases |= {name: (2, its) for name, its in TEAMS.items()}
    peaks = {name: peak(folder / f"of {name}", *case) for name, case in cases.items()}
    found = {}
    for name, (count, its) in cases.items():  # planning computes, and so comes after the forks
        base, settings = split(its)
        estimate = Estimator().estimate(load(base, [*SAME, *settings]), count)
        found[name] = {"measured": peaks[name], "estimated": estimate.total - estimate.process}
    if words:
        print(json.dumps(found[""]))
    else:
        (folder / "peaks.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])

"""A short training beside its estimate: ``python -m tests.smoke.estimate_runs FOLDER ARGUMENTS`` prints both.

The same training runs first for a step, so that libraries are loaded, their kernels built and their scratch
space taken: what the process holds then is not the training's. Large buffers come from the system and go back
to it (the environment's ``MALLOC_MMAP_THRESHOLD_``, ``train.allocator=false``): what is in use counts. With
``--team AXIS …`` two ranks along each axis do the same: the first one's peaks are printed, a line an axis.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
from pathlib import Path

from sat.cli.train import main
from sat.config.load import load
from sat.parallel.launch import Runtime
from sat.train.estimate import Estimator
from tests.configs import ROOT
from tests.training import ranks

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


def of_team(folder: Path, base: list[str], settings: list[str]) -> int:
    """The same of the first of two ranks; every team is forked from this process, which only imports."""
    import deepspeed  # noqa: F401

    work = functools.partial(on_rank, base=base, settings=settings)
    first, _ = ranks(2, folder, work, timeout=300.0)
    assert first["code"] == 0, first
    peak: int = first["value"]
    return peak


def report(peak: int, base: list[str], settings: list[str], count: int) -> None:
    """Print a measured peak and that of the estimate for ``count`` ranks, in bytes."""
    estimate = Estimator().estimate(load(base, [*SAME, *settings]), count)
    print(json.dumps({"measured": peak, "estimated": estimate.total}))


def run() -> None:
    """What the command line asks for."""
    reader = argparse.ArgumentParser(description=__doc__)
    reader.add_argument("folder", type=Path)
    reader.add_argument("words", nargs="+", metavar="YAML or section.key=value")
    reader.add_argument("--team", nargs="+", default=[], metavar="AXIS")
    args = reader.parse_args()
    base = [word for word in args.words if word.endswith(".yaml")]
    settings = [word for word in args.words if not word.endswith(".yaml")]
    if not args.team:
        report(measured(args.folder, base, settings), base, settings, 1)
        return
    teams = [[*settings, f"parallel.{axis}=2"] for axis in args.team]
    peaks = [of_team(args.folder / str(number), base, team) for number, team in enumerate(teams)]
    for peak, team in zip(peaks, teams, strict=True):  # planning computes, and so comes after the forks
        report(peak, base, team, 2)


if __name__ == "__main__":
    run()

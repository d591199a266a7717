"""A short training beside its plan: ``python -m tests.smoke.plan_runs FOLDER ARGUMENTS`` prints both peaks.

The same training runs first for a step, so that libraries are loaded, their kernels built and their scratch
space taken: what the process holds then is not the training's. Large buffers come from the system and go back
to it (the environment's ``MALLOC_MMAP_THRESHOLD_``, ``train.allocator=false``): what is in use counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

from sat.cli.train import main
from sat.config.load import load
from sat.train.plan import Planner
from tests.configs import ROOT

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


if __name__ == "__main__":
    files = [word for word in sys.argv[2:] if word.endswith(".yaml")]
    values = [word for word in sys.argv[2:] if not word.endswith(".yaml")]
    peak = measured(Path(sys.argv[1]), files, values)
    plan = Planner().plan(load(files, [*SAME, *values]), 1)
    print(json.dumps({"measured": peak, "planned": plan.total}))

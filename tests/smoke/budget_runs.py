"""A picture within a budget, measured and estimated: ``python -m tests.smoke.budget_runs FOLDER BUDGET``.

The same picture is drawn first, so that libraries are loaded and their kernels built: what the process holds
then is not the picture's. Large buffers come from the system and go back to it (the environment's
``MALLOC_MMAP_THRESHOLD_``), so that what is in use counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from pathlib import Path
from threading import Event, Thread

import torch
from safetensors.torch import save_file

from sat.cli.sample import main
from sat.config.build import build_engine
from sat.config.load import load
from sat.estimate.budget import apply_budget
from tests.configs import DEBUG
from tests.smoke.estimate_runs import resident

LARGE = ["model.params.dim=768", "model.params.heads=12", "model.params.depth=6", "sampling.pack=false"]


def weights(path: Path) -> list[str]:
    """The network's weights in a file, which is read tensor by tensor, and the settings that name it."""
    engine = build_engine(load([DEBUG], LARGE), device="cpu", dtype=torch.float32)
    save_file({name: value.contiguous() for name, value in engine.network.state_dict().items()}, path)
    return [*LARGE, f"checkpoint.model={path}"]


class Watch(Thread):
    """The most anonymous memory of this process: pages of mapped files are not a picture's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, Event()

    def run(self) -> None:
        while not self.done.wait(0.0005):
            self.most = max(self.most, resident("RssAnon"))


def measured(folder: Path, settings: list[str]) -> int:
    """The most bytes of drawing a picture beside what the process holds before it."""
    words = ["--base", str(DEBUG), *settings, "--prompt", "a red apple", "--output-dir"]
    assert main([*words, str(folder / "warm"), "--steps", "1"]) == 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, watch = resident("RssAnon"), Watch()
    watch.start()
    assert main([*words, str(folder / "run")]) == 0
    watch.done.set()
    return watch.most - before


if __name__ == "__main__":
    reader = argparse.ArgumentParser()
    reader.add_argument("folder", type=Path)
    reader.add_argument("budget")
    args = reader.parse_args()
    settings = [*weights(args.folder / "model.safetensors"), f"memory.budget={args.budget}"]
    picked = apply_budget(load([DEBUG], settings), torch.device("cpu"))
    assert picked is not None
    found = measured(args.folder, settings)
    print(
        json.dumps(
            {
                "estimated": picked.peaks.total,
                "measured": found,
                "picked": [option.setting for option in picked.options],
            }
        )
    )

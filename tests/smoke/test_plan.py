"""The planned peak is the measured one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import ROOT

PLAN = 0.15
"""Of the measured peak. Beside the plan stand batches on their way, kernels' scratch space and JIT code."""

RUNS = {
    "plus": ["configs/tiny.yaml", "configs/tiny_train.yaml", "train.batch_size=96"],
    "offload": [
        "configs/tiny.yaml", "configs/tiny_train.yaml", "train.batch_size=96", "train.zero=3",
        "train.offload={optimizer: true, parameters: true}",
    ],
    "unet": ["configs/tiny_base.yaml", "configs/tiny_base_train.yaml", "train.batch_size=320"],
    "toy": [
        "configs/debug.yaml", "configs/tiny_train.yaml", "train.batch_size=512", "train.dtype=fp32",
        "train.zero=0", "data.height=48", "data.width=64", "checkpoint.first_stage=null",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", RUNS)
def test_planned_peak_is_the_measured_one(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.smoke.plan_runs", str(tmp_path), *RUNS[name]],
        cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=PLAN)
    assert found["measured"] > 150e6, "too small to tell the training from the process"

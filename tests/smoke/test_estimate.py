"""The estimated peak is the measured one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.configs import ROOT
from tests.tolerances import ESTIMATE

RUNS = {
    "plus": ["configs/tiny.yaml", "configs/tiny_train.yaml", "train.batch_size=96"],
    "offload": [
        "configs/tiny.yaml", "configs/tiny_train.yaml", "train.batch_size=96", "train.zero=3",
        "train.offload={optimizer: true, parameters: true}",
    ],
    # In float32: buffers of bf16 convolutions depend on the processor, and some run them by slow loops.
    "unet": [
        "configs/tiny_base.yaml", "configs/tiny_base_train.yaml", "train.batch_size=160", "train.dtype=fp32",
        "train.zero=0",
    ],
    "toy": [
        "configs/debug.yaml", "configs/tiny_train.yaml", "train.batch_size=512", "train.dtype=fp32",
        "train.zero=0", "data.height=48", "data.width=64", "checkpoint.first_stage=null",
    ],
}  # fmt: skip


TEAM = ["configs/tiny.yaml", "configs/tiny_train.yaml", "train.batch_size=64"]
AXES = ("tensor", "sequence")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def compare(folder: Path, *words: str) -> Iterator[dict[str, int]]:
    """What estimate_runs prints, the last line first."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.smoke.estimate_runs", str(folder), *words],
        cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return map(json.loads, reversed(done.stdout.splitlines()))


def agree(found: dict[str, int]) -> None:
    assert found["estimated"] == pytest.approx(found["measured"], rel=ESTIMATE)
    assert found["measured"] > 150e6, "too small to tell the training from the process"


@pytest.mark.parametrize("name", RUNS)
def test_estimated_peak_is_the_measured_one(name: str, tmp_path: Path) -> None:
    agree(next(compare(tmp_path, *RUNS[name])))


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    found = compare(tmp_path_factory.mktemp("teams"), *TEAM, "--team", *AXES)
    return dict(zip(reversed(AXES), found, strict=False))


@pytest.mark.skipif(torch.__version__ < "2.6", reason="collectives want data")
@pytest.mark.parametrize("axis", AXES)
def test_estimated_peak_of_a_rank_is_the_measured_one(teams: dict[str, dict[str, int]], axis: str) -> None:
    agree(teams[axis])

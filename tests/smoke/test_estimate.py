"""The estimated peak is the measured one."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.background import Runs
from tests.smoke import estimate_runs
from tests.tolerances import ESTIMATE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
RUNS = Runs("tests.smoke.estimate_runs", environment={"MALLOC_MMAP_THRESHOLD_": "65536"})


@pytest.fixture(scope="module")
def peaks() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads((RUNS() / "peaks.json").read_text())
    return found


@pytest.mark.parametrize("name", [*estimate_runs.RUNS, *estimate_runs.TEAMS])
def test_estimated_peak_is_the_measured_one(peaks: dict[str, dict[str, int]], name: str) -> None:
    """Of a team, a rank's."""
    if name in estimate_runs.TEAMS and torch.__version__ < "2.6":
        pytest.skip("collectives want data")
    found = peaks[name]
    assert found["estimated"] == pytest.approx(found["measured"], rel=ESTIMATE)
    assert found["measured"] > 150e6, "too small to tell the training from the process"

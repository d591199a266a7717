"""A picture's measured memory stays within its budget, and is what was estimated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.configs import ROOT
from tests.tolerances import ESTIMATE

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def test_a_picture_stays_within_its_budget(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.smoke.budget_runs", str(tmp_path), "100MB"],
        cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["picked"] == ["memory.quantize.network=int8"], "in full the picture takes 178 MB"
    assert found["measured"] < 100e6
    assert found["measured"] == pytest.approx(found["estimated"], rel=ESTIMATE)

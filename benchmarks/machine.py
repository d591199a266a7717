"""What a benchmark's result file says about where its numbers are from."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sat.config.record import commit, versions

RESULTS = Path(__file__).resolve().parent / "results"


def facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, versions, commit and command, with the benchmark's own ``settings``."""
    return {
        "machine": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": versions(),
        "code": commit(),
        "command": " ".join(["python", *sys.argv]),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": dict(settings),
    }


def processor() -> str:
    """The processor's name as the system gives it; some tell generations apart by family and model alone."""
    info = Path("/proc/cpuinfo")
    said = info.read_text() if info.is_file() else ""
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", said, re.MULTILINE))
    if len(found) == 3:
        return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"
    return found.get("model name") or platform.processor() or platform.machine()


def results_folder() -> Path:
    """``benchmarks/results/<machine>``, made if need be."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder

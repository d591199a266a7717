"""Everything to ask of a GPU, in calls of a few minutes: its tests first, then the tables by importance.

    python benchmarks/gpu.py --minutes 9            # again, until it says that nothing is left
    python benchmarks/gpu.py --small                # the same code in small, on any device

Each row is written as soon as it is there, to ``benchmarks/results/<gpu>/gpu.json``; what stands there from
the same code is not measured again (``--again`` does). Rows run alone, one after the other. A package that is
missing is named, and the rows that need it are left out. Ends with code 0 when nothing is left, 75 when the
minutes are over, 1 where a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import facts, results_folder  # noqa: E402
from benchmarks.measure import compare, timing  # noqa: E402
from benchmarks.run import Limits, rated, text  # noqa: E402
from benchmarks.tables import Table, gpu  # noqa: E402
from benchmarks.worker import NO_TIME, Worker  # noqa: E402

PACKAGES = {
    "diffusers": "diffusers", "transformers": "transformers", "peft": "peft", "cache_dit": "cache-dit",
    "deepspeed": "deepspeed", "pytest": "pytest", "sageattention": "sageattention",
    "flash_attn_interface": "flash-attn 3 (its hopper folder)",
}  # fmt: skip
"""Modules that rows or tests need, and their packages."""
ORDER = (
    "gpu_step_1024_4", "gpu_attention", "gpu_peaks", "gpu_quality", "gpu_lora_1024", "gpu_step_1024_1",
    "gpu_lora_512", "gpu_training", "gpu_decode", "gpu_base",
    "gpu_step_2048_4", "gpu_text", "gpu_step_512_1", "gpu_step_512_4", "gpu_step_2048_1",
)  # fmt: skip
"""Tables, the most important first; others come after them."""
STOPPED = 75
"""Exit code of a call that leaves something."""
SMALL = {
    "plus": {"params": {"dim": 64, "heads": 2, "depth": 1, "text_dim": 16, "text_len": 8}, "cells": 8},
    "unet": {
        "params": {
            "width": 32, "text_dim": 16, "text_len": 8, "size_dim": 24, "multipliers": [1, 2],
            "attention": [2],
            "depths": [1, 1], "head_dim": 16, "groups": 8,
        },
        "cells": 8, "tokens": 8,
    },
    "vae": {"width": 16, "multipliers": [1, 2], "res_blocks": 1, "groups": 8},
    "text": {"dim": 32, "heads": 2, "head_dim": 16, "mlp_dim": 64, "depth": 1, "vocab": 64},
    "cells": 4,
    "whole": {
        "bases": ["configs/debug.yaml"], "settings": [], "sides": [48], "budgets": ["1GB", "1GB"], "steps": 3,
        "training": ["configs/debug.yaml", "configs/lora.yaml"],
        "trained": [],
    },
}  # fmt: skip
"""Sizes of ``--small``."""


class Results:
    """The results of this device, in a file that is written whole after each."""

    def __init__(self, path: Path, *, again: bool) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        self.about = facts({})
        self._again = again  # what stood in the file counts for nothing
        self._now: set[str] = set()

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep ``result``, with where it is from."""
        origin = {key: self.about[key] for key in ("device", "code", "versions", "command", "written")}
        self.known[name] = {**result, **origin}
        self._now.add(name)
        draft = self.path.with_suffix(".partial")
        draft.write_text(json.dumps(self.known, indent=1) + "\n")
        draft.replace(self.path)

    def of(self, name: str) -> dict[str, Any]:
        """Findings of this code under ``name``; empty without."""
        found: dict[str, Any] = self.known.get(name, {})
        usable = name in self._now or (not self._again and found.get("code") == self.about["code"])
        return found if usable else {}


def tests(seconds: float, words: Sequence[str]) -> dict[str, Any]:
    """The outcome of pytest with ``words``: its last line, and what failed; ``cut`` where time ran out."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *words]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said = process.communicate(timeout=max(1.0, seconds))[0].strip().splitlines()
        return {"failed": [line for line in said if line.startswith(("FAILED", "ERROR"))], "said": said[-1:]}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return {"cut": True, "failed": [], "said": process.communicate()[0].strip().splitlines()[-5:]}


def table_rows(table: Table, results: Results, limits: Limits, ends: float) -> bool:
    """Measure the rows of ``table`` that are not known; true if all are, by the time ``ends``."""
    rows: list[dict[str, Any]] = [*results.of(table.name).get("all", ())]
    known = {row["label"] for row in rows}
    for label, case in table.rows.items():
        if label in known:
            continue
        if time.monotonic() > ends:
            return False
        worker = Worker(case, limits.threads)
        try:
            first = worker.ready(ends)
            if table.once_each:
                took = timing([first])
            else:
                takes = {label: worker.sample}
                span = limits.seconds
                took = compare(takes, rounds=limits.rounds, seconds=span, warm=span / 6)[label]
            facts = {"facts": worker.facts} if worker.facts else {}
            rows.append({"label": label, **took.plain(), "peak_mb": worker.peak, **facts})
        except RuntimeError as error:
            if str(error) == NO_TIME:
                return False
            print(f"{table.name}: {label} left out: {error}", file=sys.stderr)
            rows.append({"label": label, "left_out": str(error)})
        finally:
            worker.close()
        results.add(table.name, {**rated(table, rows, limits.threads), "all": rows})
    return True


def main(argv: Sequence[str] | None = None) -> int:  # noqa: C901 - arguments, then one thing after the other
    """Do what is left, in order, until the minutes are over."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = reader.add_argument
    add("--minutes", type=float, default=9.0, help="after which nothing new is begun or waited for")
    add("--small", action="store_true", help="small sizes on any device, to try the code")
    add("--only", default="", metavar="NAMES", help="`tests` or tables by name, separated by commas")
    add("--again", action="store_true", help="measure what stands in the file already")
    add("--tests", default="-m gpu tests", metavar="WORDS", help="what pytest is given")
    add("--output", type=Path, metavar="FOLDER", help="of gpu.json, instead of benchmarks/results/<gpu>")
    args = reader.parse_args(argv)
    ends = time.monotonic() + 60 * args.minutes

    import torch

    if not torch.cuda.is_available() and not args.small:
        reader.error("torch sees no GPU here; --small tries the code in small on any device")
    for module, package in PACKAGES.items():
        if find_spec(module) is None:
            print(f"missing: {package}: rows that need it are left out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables = {table.name: table for table in gpu(args.small, device, SMALL if args.small else None)}
    names = ["tests", *(n for n in ORDER if n in tables), *(n for n in tables if n not in ORDER)]
    wanted = [name for name in args.only.split(",") if name] or names
    if strange := set(wanted) - set(names):
        reader.error(f"--only {', '.join(sorted(strange))}: there are {', '.join(names)}")
    folder = args.output or results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "gpu.json", again=args.again)
    limits = Limits(1 if args.small else 5, 1.0 if args.small else 20.0, 1)

    todo = [name for name in names if name in wanted]
    for place, name in enumerate(todo):
        if name == "tests":
            if not (found := results.of(name)) or found.get("cut"):
                found = tests(ends - time.monotonic(), args.tests.split())
                results.add(name, found)
            print(*found["failed"], *found["said"], sep="\n", flush=True)
            whole = not found.get("cut")
        else:
            whole = table_rows(tables[name], results, limits, ends)
            if results.of(name):
                print(f"{text(results.of(name))}\n", flush=True)
        if not whole:
            left = ", ".join(todo[place:])
            print(f"the {args.minutes:g} minutes are over; left: {left}; the same command goes on")
            return STOPPED
    failed = results.of("tests").get("failed", []) if "tests" in wanted else []
    print(f"nothing is left: {results.path}" + (f"; {len(failed)} tests failed" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs a member through its stages: ``python -m tests.full_size plus`` (or base, relay, t5, cogview4).

Each stage is a process of its own, whose time and peak memory are kept in FOLDER/MEMBER/done.json; the same
command goes on behind the last stage that is done. At the end the table of docs/memory.md is printed. Random
weights are drawn by name and seed, and written tensor by tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from tests.full_size.stages import DEPTHS, MEMBERS, ROOT, Choice, Stage, remove, workspace

_FAST_BF16 = ("avx512_bf16", "amx_bf16", " bf16")


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 when a stage failed."""
    reader = argparse.ArgumentParser(prog="python -m tests.full_size", description=__doc__)
    reader.add_argument("member", choices=MEMBERS)
    reader.add_argument(
        "--folder", type=Path, default=Path("runs/full_size"), help="up to 40 GB for a member"
    )
    reader.add_argument("--small", action="store_true", help="the same at small sizes, in this process")
    reader.add_argument("--dtype", choices=("fp32", "bf16"), help="of sampling and training (by processor)")
    depth = "blocks of the text encoder: of T5-XXL beside a network 1, where 24 take 17 GB more on disk"
    reader.add_argument("--text-depth", type=int, help=depth)
    reader.add_argument("--until", metavar="STAGE", help="the last stage to run")
    args = reader.parse_args(argv)
    depth = args.text_depth or DEPTHS.get(args.member, 1)
    choice = Choice(args.member, args.small, args.dtype or native_dtype(), depth)
    folder = (args.folder / args.member).absolute()
    workspace(folder, choice)
    done = Done(folder / "done.json")
    for stage in MEMBERS[args.member](choice):
        if stage.name not in done.rows:
            for path in stage.frees:
                remove(folder / path)
            if stage.makes and stage.name != "write":  # which clears all weights itself
                remove(folder / stage.makes)
            row = here(stage, folder) if args.small else apart(stage, folder)
            if row.pop("code"):
                print(f"{args.member}: {stage.name} failed: see {log_of(folder, stage)}", file=sys.stderr)
                return 1
            done.add(stage.name, row | (look(folder / stage.makes) if stage.makes else {}))
        print(f"{args.member} | {stage.name} | {json.dumps(done.rows[stage.name])}", flush=True)
        if stage.name == args.until:
            return 0
    print(table(done.rows))
    return 0


class Done:
    """The stages that are done, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Mark a stage as done, with its figures."""
        self.rows[name] = row
        self._path.write_text(json.dumps(self.rows, indent=1))


def native_dtype() -> str:
    """The type this processor is fast in: bf16 where it has instructions for it."""
    with contextlib.suppress(OSError):
        if any(flag in Path("/proc/cpuinfo").read_text() for flag in _FAST_BF16):
            return "bf16"
    return "fp32"


def apart(stage: Stage, folder: Path) -> dict[str, Any]:
    """Run a stage as a process: exit code, seconds, CPU seconds, peak of resident memory, own figures."""
    words = [word for first in stage.words[:1] for word in first.split()] + stage.words[1:]
    log = log_of(folder, stage)
    begin = time.monotonic()
    with log.open("w") as out:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(
            [sys.executable, *words], cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "code": child.returncode,
        "seconds": round(time.monotonic() - begin),
        "cpu": round(usage.ru_utime + usage.ru_stime),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        **figures(log.read_text()),
    }


def here(stage: Stage, folder: Path) -> dict[str, Any]:
    """Run a stage in this process, which starting one for each would double the time of."""
    text, place, begin, spent = io.StringIO(), Path.cwd(), time.monotonic(), time.process_time()
    name = stage.words[0].removeprefix("-m ")
    module = name if name != stage.words[0] else f"sat.cli.{Path(name).stem}"
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            main_of = __import__(module, fromlist=["main"]).main
            code = main_of(stage.words[1:])
    finally:
        os.chdir(place)
        log_of(folder, stage).write_text(text.getvalue())
    return {
        "code": code,
        "seconds": round(time.monotonic() - begin, 1),
        "cpu": round(time.process_time() - spent, 1),
        **figures(text.getvalue()),
    }


def figures(text: str) -> dict[str, Any]:
    """The last line that a stage of our own printed, as JSON."""
    last = text.strip().rpartition("\n")[2]
    return dict(json.loads(last)) if last.startswith("{") and last.endswith("}") else {}


def look(path: Path) -> dict[str, Any]:
    """Bytes that a stage left; every picture must show more than one colour."""
    for picture in path.rglob("*.png"):
        extrema = Image.open(picture).convert("L").getextrema()
        if extrema[0] == extrema[1]:
            raise SystemExit(f"{picture}: one colour")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"left_gb": round(sum(file.stat().st_size for file in files) / 1e9, 2)}


def log_of(folder: Path, stage: Stage) -> Path:
    """File of a stage's output."""
    return folder / f"{stage.name.replace(' ', '_').replace(',', '')}.log"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The stages as the rows of docs/memory.md."""
    lines = [
        "| stage | seconds | CPU seconds | peak, GB | model, GB | above it, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [row.get(key, "") for key in ("seconds", "cpu", "peak_gb", "model_gb", "above_gb")]
        lines.append(f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

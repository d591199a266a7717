"""One rank of two under torchrun is killed or suspended: how long the other and torchrun go on, what is said.

``python -m tests.attack.ranks`` prints a line for each case. Right is that the other rank has ended within
30 s and torchrun within 65 s, with the rank's number in the log and in ended.json, and nobody left.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sat.util.host import alive
from tests.attack.runs import World
from tests.configs import ROOT

WORK = ("train", "sample", "sample, one picture")
ACTS = {"killed": signal.SIGKILL, "suspended": signal.SIGSTOP}


def ranks(torchrun: int) -> dict[int, int]:
    """Process numbers of the ranks of a torchrun, by rank."""
    found = {}
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
            with contextlib.suppress(OSError):
                told = dict(
                    e.partition("=")[::2] for e in Path(f"/proc/{child}/environ").read_text().split("\0")
                )
                if "RANK" in told:
                    found[int(told["RANK"])] = int(child)
    return found


def attack(world: World, work: str, act: str, rank: int, out: Path) -> tuple[str, str]:
    """A line about one attack, and the fault in it (empty: none)."""
    if work == "train":
        words = ["train.py", *world.train(out, "train.steps=1000000", "train.save_every=100000")]
    else:
        (prompts := out.parent / "prompts.txt").write_text("red apple\n" * 5000)
        words = ["sample.py", *world.sample(out, "--prompt-file", prompts, "--steps", "8")]
        words += ["parallel.guidance=2"] if "one" in work else []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    log = out.with_suffix(".log")
    with log.open("w") as file:
        run = subprocess.Popen([*launch, *words], cwd=ROOT, stdout=file, stderr=file)
    pids: dict[int, int] = {}
    try:
        begun = "step 5/" if work == "train" else "of 5000"
        until = time.monotonic() + 180
        while begun not in log.read_text() and not list(out.glob("3_*")):
            if run.poll() is not None or time.monotonic() > until:
                return f"{work}: did not begin", log.read_text()[-500:]
            time.sleep(0.2)
        time.sleep(3)
        pids = ranks(run.pid)
        os.kill(pids[rank], ACTS[act])
        started, other = time.monotonic(), 0.0
        while run.poll() is None and time.monotonic() - started < 150:
            if not other and not alive(pids[1 - rank]):
                other = time.monotonic() - started
            time.sleep(0.02)
        whole = time.monotonic() - started
        other = other or whole
        said = log.read_text()
        ended = json.loads((out / "ended.json").read_text()) if (out / "ended.json").is_file() else {}
        left = [pid for pid in pids.values() if alive(pid)]
    finally:
        for pid in [*pids.values(), run.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        run.wait()
    wrong = [
        *([f"the other rank went on for {other:.0f} s"] if other > 30 else []),
        *([f"torchrun went on for {whole:.0f} s"] if whole > 65 else []),
        *([f"{len(left)} processes are left"] if left else []),
        *([f"the log does not name rank {rank}"] if f"rank {rank} of 2" not in said else []),
        *(
            [f"ended.json: {ended}"]
            if ended.get("code") != 1 or f"rank {rank}" not in ended["reason"]
            else []
        ),
    ]
    line = f"{work}: rank {rank} {act}: the other ended after {other:.1f} s, torchrun after {whole:.1f} s"
    return f"{line}; ended.json: {ended.get('reason')!r}", "; ".join(wrong)


def cases(works: list[str], acts: list[str]) -> Iterator[tuple[str, str, int]]:
    """Every case that is asked for."""
    yield from itertools.product(works, acts, (1, 0))


def main() -> int:
    """Attack; 1 if anything failed."""
    reader = argparse.ArgumentParser(prog="python -m tests.attack.ranks", description=__doc__)
    reader.add_argument("--work", nargs="+", choices=WORK, default=list(WORK))
    reader.add_argument("--acts", nargs="+", choices=ACTS, default=list(ACTS))
    args = reader.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "good")
        world.write()
        for number, case in enumerate(cases(args.work, args.acts)):
            (place := Path(folder) / str(number)).mkdir()
            line, wrong = attack(world, *case, place / "out")
            failed += bool(wrong)
            print(f"FAIL {line}: {wrong}" if wrong else line, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""kill -9 at random moments of small trainings, samplings and conversions, started again until they are done.

``python -m tests.attack.kills --count 100 --seed 0`` prints a line for each failure, and totals. Right is
that what is killed and started again ends with the bits of a run that was let alone, without a traceback and
without drafts left.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import deepspeed  # noqa: F401 - imported before processes are forked, which then start at once
import torch._dynamo  # noqa: F401

import sat.cli.commands.sample
import sat.cli.commands.train  # noqa: F401
from tests.attack.runs import CONVERT, SAMPLE, TRAIN, World, by_hand, result

KINDS = ("train", "background", "sample", "lora", "convert")
LONGEST = 120.0
"""Seconds after which a run that was let alone hangs."""


def child(
    main: Callable[[Sequence[str]], int], words: Sequence[str], log: Path, seconds: float
) -> int | None:
    """Exit code of a command in a forked process that says into ``log``; None if it had to be killed."""
    sys.stdout.flush()
    started = time.monotonic()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = main(words)
            sys.stdout.flush()
        finally:
            os._exit(code)
    while time.monotonic() - started < seconds:
        if (found := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(found[1])
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return None if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL else 0


def command(world: World, kind: str, out: Path, *, again: bool):
    """The command of ``kind``; ``again``: after it was killed."""
    resume = ["--resume"] if again else []
    if kind == "convert":
        return CONVERT, [str(world.root / "native"), str(out), "--to", "diffusers"]
    if kind == "sample":
        return SAMPLE, world.sample(out, *resume, "sampling.batch_size=2")
    if kind == "background":
        return TRAIN, world.train(out, *resume, "train.background_save=true", "train.save_every=1")
    return TRAIN, world.train(out, *resume, kind=kind)


def drafts(out: Path) -> list[str]:
    """Names of half-written files that a finished command has left."""
    return [
        path.name for path in out.parent.rglob("*") if path.name.startswith(".") and out.name in str(path)
    ]


def attack(
    world: World, kind: str, out: Path, kills: int, length: float, rng: random.Random
) -> tuple[int, str]:
    """Kill a run of ``kind`` up to ``kills`` times, then let it end: kills that hit, and why it is wrong."""
    log, hit = out.parent / f"{out.name}.log", 0
    for number in range(kills + 1):
        seconds = LONGEST if number == kills else rng.uniform(0, length)
        code = child(*command(world, kind, out, again=number > 0), log, seconds)
        hit += code is None
        if code == 0 or (kind == "convert" and out.exists()):  # whole, by that
            break
        if code is not None or number == kills:
            return hit, f"code {code}: {log.read_text()[-300:]!r}"
    said = log.read_text()
    return hit, f"a traceback: {said[said.index('Traceback') :][:300]!r}" if "Traceback" in said else ""


def attacks(count: int, seed: int, kinds: Sequence[str] = KINDS) -> tuple[list[str], Counter[str]]:
    """Failures of runs that were killed ``count`` times in all, and the kills by kind."""
    failures, ends = list[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        world, right, lengths = World(root / "good"), {}, {}
        world.write()
        for kind in kinds:
            started = time.monotonic()
            code = child(*command(world, kind, root / "out", again=False), root / "log", LONGEST)
            assert code == 0, (root / "log").read_text()
            right[kind], lengths[kind] = result(root / "out"), time.monotonic() - started
            shutil.rmtree(root / "out")
        number = 0
        while sum(ends.values()) < count:
            kind, rng = kinds[number % len(kinds)], random.Random(f"{seed} {number}")
            out = root / f"run{number}" / "out"
            out.parent.mkdir()
            kills = min(rng.randint(1, 4), count - sum(ends.values()))
            hit, why = attack(world, kind, out, kills, lengths[kind], rng)
            ends[kind] += hit
            made = {} if why else result(out)
            if not why and made != right[kind]:
                names = [name for name in {*made, *right[kind]} if made.get(name) != right[kind].get(name)]
                why = f"{len(names)} results differ, such as {min(names)}"
            if not why and (left := drafts(out)):
                why = f"left {', '.join(left)}"
            failures += [f"FAIL {number}: {kind}, killed {hit} times: {why}"] if why else []
            shutil.rmtree(out.parent)
            number += 1
    return failures, ends


if __name__ == "__main__":
    raise SystemExit(by_hand("kills", __doc__, attacks, KINDS, 100))

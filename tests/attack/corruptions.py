"""Seeded damage of weights, adapters and a run's state, read by sample.py, train.py and convert.py.

``python -m tests.attack.corruptions --count 200 --seed 0`` calls the commands in this process and prints a
line for each failure, and totals. Right is a refusal in lines without a traceback, or exactly the numbers of
the healthy files.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.attack.runs import CONVERT, SAMPLE, TRAIN, World, by_hand, result, run

KINDS = (
    "sample native", "sample sat", "sample bare", "sample diffusers", "convert native", "convert sat",
    "convert diffusers", "resume train", "resume lora", "sample lora",
)  # fmt: skip
"""The command and what it reads: ``bare`` is an official folder without digests, ``lora`` a run of one."""
CHANGES = ("bit", "bit", "zeros", "noise", "cut", "more", "gone")


class Setting(NamedTuple):
    """Healthy folders, and what each kind of run makes of them."""

    world: World
    right: dict[str, dict[str, str]]


def prepare(root: Path, kinds: Sequence[str] = KINDS) -> Setting:
    """Healthy folders in ``root``, and the right results."""
    world, right = World(root / "good"), dict[str, dict[str, str]]()
    world.write()
    for name in {kind.split()[1] for kind in kinds} & {"train", "lora"}:
        code, said = run(TRAIN, world.train(world.root / name, kind=name))
        assert code == 0, said
        right[f"resume {name}"] = result(world.root / name)
        shutil.rmtree(world.root / name / "checkpoints" / "step_00000006")
    for kind in kinds:
        if kind not in right:
            code, said = run(*command(world, kind, world.root, root / "out"))
            assert code == 0, said
            right[kind] = result(root / "out")
            assert right[kind]
            shutil.rmtree(root / "out")
    return Setting(world, right)


def command(world: World, kind: str, folder: Path, out: Path):
    """The command of ``kind`` over ``folder``, which holds what it reads under its name; into ``out``."""
    what, name = kind.split()
    if what == "convert":
        return CONVERT, [str(folder / name), str(out), "--to", "sat" if name == "native" else "native"]
    if what == "resume":
        return TRAIN, world.train(folder / name, "--resume", kind=name)
    if name == "lora":
        return SAMPLE, world.sample(out, "--lora", folder / name)
    beside = folder / name / "t5-v1_1-xxl" / "spiece.model"
    more = [] if name == "bare" else [f"conditioning.tokenizer={beside if name == 'sat' else 'null'}"]
    return SAMPLE, world.sample(out, *more, weights=folder / name)


def target(kind: str, folder: Path, rng: random.Random) -> Path:
    """A file of ``folder`` to damage, mostly one of weights."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if kind.endswith("bare"):  # nothing can tell of a text encoder's safetensors and a vocabulary
        files = [path for path in files if path.suffix == ".pt"]
    if kind.startswith(("resume", "sample lora")):  # the newest checkpoint
        files = [path for path in files if "step_00000004" in path.parts]
    heavy = [path for path in files if path.suffix in (".safetensors", ".pt", ".model")]
    return rng.choice(heavy if rng.random() < 0.75 and heavy else files)


def damage(file: Path, rng: random.Random, changes: Sequence[str] = ("bit", "zeros", "noise", "cut")) -> str:
    """Change ``file`` somewhere, by one of ``changes``; what was done."""
    before = file.read_bytes()
    raw, change = bytearray(before), rng.choice(changes)
    at = rng.randrange(len(raw))
    end = min(at + 4096, len(raw))
    if change == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif change == "cut":
        del raw[at:]
    elif change == "more":
        raw += rng.randbytes(rng.randrange(1, 5000))
    elif change != "gone":
        raw[at:end] = bytes(end - at) if change == "zeros" else rng.randbytes(end - at)
    if bytes(raw) == before:
        raw[at] ^= 1
    file.unlink() if change == "gone" else file.write_bytes(raw)
    return f"{change} at {at} of {file.name} ({len(before)} bytes)"


def attack(setting: Setting, kind: str, root: Path, rng: random.Random) -> tuple[str, str | None]:
    """Damage a copy and run the command: how it ended, and the failure in a line, None if it was right."""
    name = kind.split()[1]
    shutil.copytree(setting.world.root / name, root / "bad" / name)
    file = target(kind, root / "bad" / name, rng)
    done = f"{file.parent.relative_to(root / 'bad')}: {damage(file, rng, CHANGES)}"
    out = root / "out"
    try:
        code, said = run(*command(setting.world, kind, root / "bad", out))
        made = result(root / "bad" / name if kind.startswith("resume") else out) if code == 0 else {}
    except BaseException as error:  # noqa: BLE001 - what is looked for
        return "escaped", f"{kind}: {done}: {type(error).__name__} escaped: {error}"
    finally:
        shutil.rmtree(root / "bad")
        shutil.rmtree(out, ignore_errors=True)
    why, right = None, setting.right[kind]
    if "Traceback" in said:
        why = f"a traceback: {said[-300:]!r}"
    elif code == 0:
        changed = {name for name in {*made, *right} if made.get(name) != right.get(name)}
        older = "is torn (" in said and kind == "sample lora"  # it said so, and took the checkpoint before
        if changed and not older:
            why = f"silent: {len(changed)} results differ, such as {min(changed)}"
    elif code not in (1, 2) or not said.strip().splitlines()[-1].startswith(("error: ", " ")):
        why = f"code {code}: {said[-300:]!r}"
    elif "--debug shows where" in said:
        why = f"an inner error: {said[-300:]!r}"
    return "harmless" if code == 0 else "refused", None if why is None else f"{kind}: {done}: {why}"


def attacks(count: int, seed: int, kinds: Sequence[str] = KINDS) -> tuple[list[str], Counter[str]]:
    """Failures of ``count`` corruptions, and how they ended."""
    failures, ends = list[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        setting = prepare(root, kinds)
        for number in range(count):
            kind = kinds[number % len(kinds)]
            end, failure = attack(setting, kind, root, random.Random(f"{seed} {number}"))
            ends[f"{end}"] += 1
            failures += [] if failure is None else [f"FAIL {number}: {failure}"]
    return failures, ends


if __name__ == "__main__":
    raise SystemExit(by_hand("corruptions", __doc__, attacks, KINDS, 200))

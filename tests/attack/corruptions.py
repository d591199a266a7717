"""Seeded damage of weights and of a run's state: none may pass in silence, none may be a traceback.

python -m tests.attack.corruptions --count 200 --seed 0
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from sat.checkpoint import CheckpointError, load, save_diffusers, save_native, save_sat
from sat.checkpoint.verify import digest_file
from sat.train.resume import ResumeError, RunFolder
from tests.checkpoints import CONFIG, build, tensors
from tests.unit.test_train_resume import PROGRESS

KINDS = ("native", "sat", "sat without digests", "diffusers", "state")


def write(root: Path) -> None:
    """One healthy folder of every kind."""
    for name, save in (("native", save_native), ("sat", save_sat), ("diffusers", save_diffusers)):
        save(root / name, tensors(), CONFIG)
    shutil.copytree(root / "sat", root / "sat without digests")
    for file in (root / "sat without digests").glob("[1v]*/digests.json"):
        file.unlink()
    run = RunFolder(root / "state")
    path = run.begin(3)
    (path / "state").mkdir()
    shard = path / "state" / "shard_000_00000.safetensors"
    shutil.copyfile(root / "native" / "model.safetensors", shard)
    run.commit(path, replace(PROGRESS, step=3), {"state/" + shard.name: digest_file(shard)})


def damage(file: Path, rng: random.Random) -> str:
    """Change bytes of ``file`` somewhere; what was done."""
    raw = bytearray(file.read_bytes())
    at, kind = rng.randrange(len(raw)), rng.choice(["bit", "zeros", "noise", "cut"])
    before = bytes(raw)
    if kind == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del raw[at:]
    else:
        end = min(at + 4096, len(raw))
        raw[at:end] = bytes(end - at) if kind == "zeros" else rng.randbytes(end - at)
    if bytes(raw) == before:
        raw[at] ^= 1
    file.write_bytes(raw)
    return f"{kind} at {at} of {file.name}"


def attack(kind: str, folder: Path, rng: random.Random) -> str | None:
    """Damage ``folder`` and read it; the failure in a line, None if it was told."""
    patterns = {"state": "**/shard_*", "native": "*.safetensors"}
    found = sorted(p for p in folder.glob(patterns.get(kind, "**/*")) if p.suffix in (".safetensors", ".pt"))
    files = [p for p in found if "t5" not in str(p)] if "without" in kind else found
    done = damage(rng.choice(files), rng)
    try:
        if kind == "state":
            saved = RunFolder(folder).saved()
            if not saved:
                return None  # told as torn
            saved[-1].verify(0, 1, lambda own: [own])
        else:
            for part in ("model", "first_stage", "text"):
                load(build(part, meta=True), folder, part)
    except (CheckpointError, ResumeError):
        return None
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"{kind}: {done}: {type(error).__name__}: {error}"
    return f"{kind}: {done}: silent"


def run(count: int, seed: int) -> list[str]:
    """Failures of ``count`` corruptions."""
    failures = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write(root / "good")
        for number in range(count):
            rng, kind = random.Random(f"{seed} {number}"), KINDS[number % len(KINDS)]
            shutil.copytree(root / "good" / kind, root / "bad")
            if (failure := attack(kind, root / "bad", rng)) is not None:
                failures.append(f"{number}: {failure}")
            shutil.rmtree(root / "bad")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failures = run(args.count, args.seed)
    print("\n".join([*failures, f"{args.count} corruptions, {len(failures)} silent or with a traceback"]))
    sys.exit(bool(failures))

"""Small healthy weights, trainings and pictures to attack, and the commands over them, in this process."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

from sat.checkpoint import save_diffusers, save_native, save_sat
from sat.cli import convert, sample, train
from tests.checkpoints import CONFIG, tensors, tokenizer
from tests.configs import ROOT

FORMATS = {"native": save_native, "sat": save_sat, "diffusers": save_diffusers}
SAMPLING = {"height": 16, "width": 24, "steps": 2, "sizes": {"min": 8, "max": 48, "multiple": 8}}
TRAINING = {
    "objective": {
        "target": "sat.train.objectives.diffusion.DiffusionObjective",
        "params": {"train_text": True},
    },
    "steps": 6, "batch_size": 2, "lr": 1e-3, "ema": 0.9, "log_every": 1, "save_every": 2, "keep_last": 3,
    "wandb": "disabled",
}  # fmt: skip
DATA = {"sources": [{"path": f"{ROOT}/data/emoji_sample"}], "height": 16, "width": 24, "workers": 0}
PROMPTS = "red apple\na dog\nthe sun\n"
SAMPLE, TRAIN, CONVERT = sample.main, train.main, convert.main


class World:
    """Configs and healthy weights in ``root``: its command lines."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self) -> None:
        """Make the weights, in every format, and the configs."""
        self.root.mkdir(parents=True, exist_ok=True)
        spiece = tokenizer(self.root / "spiece.model")
        for name, save in FORMATS.items():
            save(self.root / name, tensors(), CONFIG, tokenizer=spiece)
        shutil.copytree(self.root / "sat", self.root / "bare")
        for file in self.root.glob("bare/**/digests.json"):
            file.unlink()
        (self.root / "prompts.txt").write_text(PROMPTS)
        tree = {**CONFIG, "sampling": SAMPLING, "parallel": {"device": "cpu"}}
        tree["conditioning"] = {**CONFIG["conditioning"], "tokenizer": str(spiece)}
        lora = {"adapters": {"lora": {"rank": 2, "alpha": 2}}}
        objective = {**TRAINING["objective"], "params": {}}
        files = {
            "model": tree,
            "train": {"train": TRAINING, "data": DATA},
            "lora": {"train": {**TRAINING, "objective": objective}, "data": DATA, **lora},
        }
        for name, content in files.items():
            (self.root / f"{name}.yaml").write_text(json.dumps(content))

    def sample(self, out: Path, *more: object, weights: Path | None = None) -> list[str]:
        """Words of a sampling run."""
        words = ["--prompt-file", self.root / "prompts.txt", "--output-dir", out, *more]
        return self._words(["model"], weights, words)

    def train(self, out: Path, *more: object, kind: str = "train", weights: Path | None = None) -> list[str]:
        """Words of a training."""
        return self._words(["model", kind], weights, ["--output-dir", out, *more])

    def _words(self, files: list[str], weights: Path | None, more: Sequence[object]) -> list[str]:
        bases = [self.root / f"{name}.yaml" for name in files]
        path = f"checkpoint.path={weights or self.root / 'native'}"
        return [str(word) for word in ("--base", *bases, *more, path)]


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Inside, commands may set up the log and signals of the process."""
    handlers, term = list(logging.getLogger().handlers), signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        logging.getLogger().handlers[:] = handlers
        signal.signal(signal.SIGTERM, term)


def run(main: Callable[[Sequence[str]], int], words: Sequence[str]) -> tuple[int, str]:
    """Exit code of a command in this process, and all it said."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.stderr.flush()
            logging.getLogger().handlers[:] = []
    return code, said.getvalue()


def result(out: Path) -> dict[str, str]:
    """Digests of the numbers that a command left in ``out``: pixels, tensors of the last checkpoint."""
    found: dict[str, str] = {}
    if (out / "checkpoints").is_dir():
        last = max((out / "checkpoints").iterdir(), default=out)
        out = last if (last / "COMPLETE").is_file() else out
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        name = file.relative_to(out).as_posix()
        if file.suffix == ".png":
            found[name] = hashlib.sha256(np.asarray(Image.open(file)).tobytes()).hexdigest()
        elif file.suffix == ".safetensors":
            for key, value in load_file(file).items():
                found[f"{name} {key}"] = hashlib.sha256(value.view(-1).numpy().tobytes()).hexdigest()
        elif file.suffix in (".pt", ".model"):
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def by_hand(
    name: str,
    about: str | None,
    attacks: Callable[[int, int, Sequence[str]], tuple[list[str], Counter[str]]],
    kinds: Sequence[str],
    count: int,
) -> int:
    """``python -m tests.attack.NAME``: attack as the command line says; 1 if anything failed."""
    reader = argparse.ArgumentParser(prog=f"python -m tests.attack.{name}", description=about)
    reader.add_argument("--count", type=int, default=count)
    reader.add_argument("--seed", type=int, default=0)
    reader.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    args = reader.parse_args()
    started = time.monotonic()
    failures, ends = attacks(args.count, args.seed, args.kinds)
    print("\n".join(failures), end="\n" * bool(failures))
    told, seconds = ", ".join(f"{end}: {number}" for end, number in sorted(ends.items())), time.monotonic()
    print(f"{sum(ends.values())} {name} in {seconds - started:.0f} s ({told}); {len(failures)} failed")
    return int(bool(failures))

"""Running sample.py on the toy model inside the test process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sat.cli.sample import main

ROOT = Path(__file__).parents[1]
DEBUG = ROOT / "configs" / "debug.yaml"


class Done(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


class Command:
    """``sample.py --base configs/debug.yaml`` with a tokenizer of the test's own."""

    def __init__(self, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.tokenizer = tokenizer
        self.capsys = capsys

    def arguments(self, *more: object) -> list[str]:
        words = ["--base", DEBUG, f"conditioning.tokenizer={self.tokenizer}", "parallel.device=cpu", *more]
        return [str(word) for word in words]

    def __call__(self, *more: object) -> Done:
        self.capsys.readouterr()
        try:
            code = main(self.arguments(*more))
        except SystemExit as stop:
            code = int(str(stop.code))
        captured = self.capsys.readouterr()
        return Done(code, captured.out, captured.err)


def pixels(path: Path) -> NDArray[np.int64]:
    """(H, W, 3) of a picture."""
    return np.asarray(Image.open(path)).astype(np.int64)


def files(folder: Path) -> dict[str, bytes]:
    """Contents of the PNG files below ``folder`` by their relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.png"))}

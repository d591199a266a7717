"""The first hour of docs/first_hour.md: each command prints what the page shows, numbers and paths apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.architecture.tree import ROOT

PAGE = ROOT / "docs" / "first_hour.md"
BY_HAND = "SAT_FIRST_HOUR"
"""Set to 1: also the commands that install or train, which take minutes."""


class Step(NamedTuple):
    """A command of the page, the lines that it shows, and whether it is run by hand."""

    command: str
    shown: list[str]
    by_hand: bool

    def __str__(self) -> str:
        return self.command


def steps(text: str) -> list[Step]:
    """The commands of the page in order, each a block with its output below."""
    pattern = r"^```bash\n(# by hand\n)?([^\n]+)\n```\n\n```text\n(.*?)^```"
    found = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    return [Step(command, shown.splitlines(), bool(hand)) for hand, command, shown in found]


STEPS = steps(PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like a fresh checkout."""
    root = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("outputs", "runs", "wandb") and not entry.name.startswith("."):
            (root / entry.name).symlink_to(entry)
    return root


def plain(line: str) -> str:
    """``line`` without what differs from machine to machine: numbers, and the place of the checkout."""
    return re.sub(r"\d+(?:[.,:]\d+)*", "0", line.rstrip())


def said(command: str, folder: Path) -> list[str]:
    """Lines that a command prints."""
    python = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{python}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": "", "COLUMNS": "100", "WANDB_MODE": "offline"}
    command = re.sub(r"^cogview3 ", "python -m cogview3 ", command)
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.timeout(900)  # a training on a busy machine
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_command_prints_what_the_page_shows(step: Step, checkout: Path) -> None:
    """Lines of the page are in the output in this order; ``…`` is the rest of a line, or lines."""
    if step.by_hand and not os.environ.get(BY_HAND):
        pytest.skip(f"takes longer; {BY_HAND}=1 runs it")
    lines = iter(map(plain, printed := said(step.command, checkout)))
    for shown in step.shown:
        if shown == "…":
            continue
        begin = plain(shown).partition("…")
        found = any(line.startswith(begin[0]) if begin[1] else line == begin[0] for line in lines)
        assert found, f"{shown!r} is not in:\n" + "\n".join(printed)

"""Every command that a reader is told to type is one that the programs accept."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.commands import Command, commands, parsed
from tests.architecture.tree import ROOT, files

WRITTEN = commands("*.md", "docs/*.md", "data/*.md", "sample_scripts/*", "train_scripts/*")
CHECKED = {"sample.py": "sat.cli.sample", "train.py": "sat.cli.train"}
PARSED = {"convert.py": "sat.cli.convert", "prompt_optimize.py": "sat.cli.prompt_optimize"}
FIRST = (
    "pip install -r requirements.txt"
    ' && torchrun --standalone sample.py --base configs/tiny.yaml --prompt "a red apple"'
)
SECOND = "pip install -r requirements.txt -r requirements-dev.txt && pytest"


@pytest.mark.parametrize("command", dict.fromkeys(WRITTEN), ids=str)
def test_documented_command_is_accepted(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert accepted(command) == 0, capsys.readouterr().out


def accepted(command: Command) -> int:
    """0 when the program takes the arguments: checked with its config where there is one, else parsed."""
    if command.program in CHECKED:
        arguments = [word for word in command.arguments if word not in ("--print-config",)]
        return int(importlib.import_module(CHECKED[command.program]).main([*arguments, "--check"]))
    if command.program == "sat.cli.evaluate" and "--base" in command.arguments:
        return int(importlib.import_module(command.program).main([*command.arguments, "--check"]))
    if command.program in PARSED or command.program.startswith("sat.cli."):
        module = PARSED.get(command.program, command.program)
        importlib.import_module(module).parser().parse_args(list(command.arguments))
        return 0
    if command.program == "pytest":
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--version", *command.arguments],
            capture_output=True,
            check=False,
        )
        missing = [
            word for word in command.arguments if word.startswith("tests/") and not Path(word).exists()
        ]
        return done.returncode or len(missing)
    return 0 if (ROOT / command.program).is_file() else 1


def test_a_wrong_command_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    wrong = Command(ROOT / "README.md", "sample.py", ("--base", "configs/debug.yaml", "sampling.stepz=3"))
    assert accepted(wrong) == 2
    assert "did you mean 'sampling.steps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("sbatch --nodes=2 train_scripts/sft.sbatch convert.py --help-me", 2),
        ("sbatch train_scripts/lora.sbatch --setps 3", 2),
        ("sbatch train_scripts/gone.sbatch train.py --base configs/tiny.yaml", 1),
    ],
)
def test_a_wrong_job_is_noticed(line: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (wrong,) = parsed(ROOT / "README.md", line)
    try:
        assert accepted(wrong) == code
    except SystemExit as stop:
        assert stop.code == code


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_readme_has_the_two_commands(name: str) -> None:
    """One shows a picture, the other runs the tests; nothing else is needed for either."""
    text = (ROOT / name).read_text()
    assert FIRST in text and SECOND in text


def test_ci_runs_what_the_readme_says() -> None:
    script = (ROOT / ".ci/run").read_text()
    for part in SECOND.split(" && "):
        words = part.split()
        assert re.search(r"\b" + r"\b.*".join(map(re.escape, words)), script), part
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in files():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken

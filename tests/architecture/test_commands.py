"""Every command that a reader is told to type is one that the programs accept."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from cogview3 import __main__ as cogview3
from tests.architecture.commands import Command, commands, lines, parsed
from tests.architecture.tree import ROOT, files

FILES = ("*.md", "docs/*.md", "data/*.md", "sample_scripts/*", "train_scripts/*")
WRITTEN = [
    one for one in commands(*FILES) if one.where.name != "first_hour.md"
]  # mistakes too; it has a test
CHECKED = {"sample.py": "sat.cli.sample", "train.py": "sat.cli.train"}
CHECKED |= dict.fromkeys(("sample_dit.py", "sample_unet.py"), "sat.cli.sample")
PARSED = {"convert.py": "sat.cli.convert", "prompt_optimize.py": "sat.cli.prompt"}
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
    """0 when the program takes the arguments; a command on several pages is tried once."""
    return _accepted(command.program, command.arguments)


@functools.cache
def _accepted(program: str, words: tuple[str, ...]) -> int:  # noqa: C901 - a program after the other
    """Checked with its config where there is one, else parsed."""
    if program == "cogview3" or program.partition(" ")[2] == "completion":
        return cogview3.main([*program.split()[1:], *words])
    if program.startswith("cogview3 "):
        module = f"sat.cli.{program.partition(' ')[2]}"
        program = next((script for script, of in CHECKED.items() if of == module), module)
    if program in CHECKED:
        arguments = [word for word in words if word not in ("--print-config",)]
        module = importlib.import_module(CHECKED[program])
        theirs = (
            "my.yaml",
            "cogview3_plus.yaml",
            "cogview3_base.yaml",
        )  # the reader's, and the original code's
        if "--help" in arguments or any(Path(word).name in theirs for word in arguments):
            return _parsed(module, arguments)
        return int(module.main([*arguments, "--check"]))
    if program == "sat.cli.evaluate" and "--base" in words:
        return int(importlib.import_module(program).main([*words, "--check"]))
    if program in PARSED or program.startswith("sat.cli."):
        return _parsed(importlib.import_module(PARSED.get(program, program)), words)
    if program == "pip":
        return len(not_installable(words))
    if program == "mkdocs":
        return 0 if words == ("build", "--strict") else 1
    if program.startswith("tests."):
        return 0 if importlib.util.find_spec(program) else 1
    if program == "pytest":
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "--version", *words], capture_output=True, check=False
        )
        missing = [word for word in words if word.startswith("tests/") and not Path(word).exists()]
        return done.returncode or len(missing)
    return len(unknown_options(program, words)) if (ROOT / program).is_file() else 1


def _parsed(program: ModuleType, arguments: Sequence[str]) -> int:
    """0 when the arguments, or the call for help, are understood."""
    verify = arguments[:1] == ("verify",) and hasattr(program, "verify_parser")
    try:
        if verify:
            program.verify_parser().parse_args(list(arguments[1:]))
        else:
            program.parser().parse_args(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def not_installable(arguments: Sequence[str]) -> list[str]:
    """Words after ``pip install`` that name no file, no extra, or another version than the requirements."""
    bounds = re.findall(
        r'^[\w.-]+(?:[<>=]=?[^\s"#]+)', "\n".join(p.read_text() for p in ROOT.glob("requirements*.txt")), re.M
    )
    extras = dict(re.findall(r'^([\w-]+) = \[(".+")\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    bounds += [name for names in extras.values() for name in re.findall('"([^"]+)"', names)]
    found, (verb, *words) = [], arguments
    for before, word in zip(["", *words], words, strict=False):
        if before == "-r":
            good = (ROOT / word).is_file()
        elif before == "-e" or word.startswith("."):
            good = word == "." or set(word.removeprefix(".[").removesuffix("]").split(",")) <= set(extras)
        elif re.search("[<>=]", word):
            good = word in bounds
        else:
            good = word in ("-r", "-e") or re.fullmatch(r"[a-z][a-z0-9-]+", word) is not None
        found += [] if good else [word]
    return found if verb == "install" else [verb]


def unknown_options(program: str, words: Sequence[str]) -> list[str]:
    """Options that the source of a script does not spell; what these mean is the script's own affair."""
    source = (ROOT / program).read_text()
    options = [word for word in words if word.startswith("--") and word != "--help"]
    return [word for word in options if f'"{word}"' not in source]


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
        ('pip install "gradio>=5,<6"', 1),
        ("pip install -r requirements-all.txt", 1),
        ("pip install -e '.[parquet,pictures]'", 1),
        ("mkdocs build --strickt", 1),
        ("python -m tests.smoke.gone FOLDER", 1),
        ("python benchmarks/run.py --ony lora", 1),
        ("sh train_scripts/gone.sh", 1),
        ("sbatch --nodes=2 train_scripts/sft.sbatch convert.py --help-me", 2),
        ("sbatch train_scripts/lora.sbatch --setps 3", 2),
        ("sbatch train_scripts/gone.sbatch train.py --base configs/tiny.yaml", 1),
    ],
)
def test_a_wrong_line_is_noticed(line: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
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
        if path.suffix != ".md" or path.is_relative_to(ROOT / "tests/fixtures"):
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert not broken


def test_commands_in_prose_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Type `python sample.py\n--steps 3` or `sample.py`.\n```text\nOUT/\npython train.py --ranks N\n```\n"
    )
    found = [command for line in lines(page) for command in parsed(page, line)]
    assert [(one.program, one.arguments) for one in found] == [
        ("train.py", ("--ranks", "2")),
        ("sample.py", ("--steps", "3")),
    ]
